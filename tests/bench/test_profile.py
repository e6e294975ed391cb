"""What bench.profile counts of a launch."""

import numpy as np

from bench.profile import linear_work
from fastdeploy.kernels.formats import FORMATS
from fastdeploy.kernels.launch import view


def test_a_gated_layer_reads_each_tensor_once_and_multiplies_gate_and_up():
    x, data = view(np.zeros((3, 64), np.int8)), view(np.zeros((4, 2, 4, 16, 4), np.uint8))
    arguments = {"x": x, "x_low": None, "data": data, "I": 32, "K": 64, "FORMAT": FORMATS["Q4_0"].constants}
    work = linear_work(arguments)
    assert (work.bytes, work.operations, work.in_integers) == (3 * 64 + 64 * 64 // 2, 2 * 3 * 64 * 64, True)
