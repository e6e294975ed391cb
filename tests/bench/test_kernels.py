"""The microbenchmark's own logic: what it counts, chooses, checks and compares, and one small run of it."""

import csv
import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from bench.kernels import __main__ as program
from bench.kernels.machine import NumpyMachine, Peaks, Unavailable
from bench.kernels.operations import Activation, AddNorm, Linear, Mixture, Norm, QuantisedLinear, Rope
from bench.kernels.providers import NumPy, opened
from bench.kernels.report import Measurement, comparison, goal_rows, read_microseconds, slower
from bench.kernels.selection import (
    ERNIE_MOE,
    LLAMA,
    QWEN_SMALL,
    SMOLLM2,
    Goal,
    decode,
    default,
    everything,
    goal,
    mixed,
    prefill,
    selected,
)

PEAKS = Peaks(bandwidth=1e12, arithmetic=100e12)
MEASURED = Measurement("linear", "Llama-3-8B qkv", "ours", 10**9, 10**9, seconds=2e-3, least=1e-3, greatest=3e-3)


# Bytes and FLOPs


def test_a_norm_reads_and_writes_every_element_once():
    assert Norm(LLAMA, "bfloat16", 8).work() == (8 * 4096 * 2 * 2 + 4096 * 4, 4 * 8 * 4096)


def test_an_added_norm_moves_the_residual_stream_twice_and_two_more():
    assert AddNorm(SMOLLM2, "float32", 8).work().bytes == 8 * 576 * 4 * 4 + 576 * 4


def test_an_activation_reads_two_and_writes_one():
    assert Activation(LLAMA, "bfloat16", 2).work().bytes == 2 * 14336 * 3 * 2


def test_rope_reads_qkv_and_its_angles_and_writes_q_and_the_cache():
    read = (32 + 8 + 8) * 128 * 2 + 128 * 4 + 4 + 8  # qkv; 64 cosines and 64 sines; position and slot
    assert Rope(LLAMA, "bfloat16", 10).work().bytes == 10 * (read + 32 * 128 * 2 + 16 * 128 * 2)


def test_a_linear_layer_reads_its_weights_once():
    work = Linear(LLAMA, "bfloat16", 64, "gate_up").work()
    assert work == (28672 * 4096 * 2 + 64 * (4096 + 28672) * 2, 2 * 64 * 28672 * 4096)


def test_a_weight_of_4_bits_takes_5_with_its_scales():
    work = QuantisedLinear(SMOLLM2, "float32", 1, "gate_up").work()
    assert work.bytes == 3072 * 576 * 5 // 8 + 576 + 576 // 32 * 8 + 3072 * 4


def test_a_decode_reads_its_context_once_for_all_heads_of_a_group():
    work = decode(LLAMA, "bfloat16", 64, 4096).work()
    assert work.bytes == 64 * 4096 * 8 * 128 * 2 * 2 + 2 * 64 * 32 * 128 * 2
    assert work.flops == 4 * 128 * 32 * 64 * 4096


def test_a_prompt_sees_half_of_the_square():
    assert prefill(LLAMA, "bfloat16", 8192).work().flops == pytest.approx(4 * 128 * 32 * 8192**2 / 2, rel=2e-4)


def test_a_chunk_sees_its_past_and_its_own_half():
    seen = 2 * 300 + 2 * (4 * 296 + 4 * 5 // 2)
    assert mixed(SMOLLM2, "float32", 2, 300, 4).work().flops == 4 * 64 * 9 * seen


def test_one_token_of_a_mixture_reads_its_own_experts():
    work = Mixture(ERNIE_MOE, "bfloat16", 1).work()
    assert work.bytes == 6 * 3 * 1536 * 2560 * 2 + 2 * 2560 * 2 + 64 * 4
    assert work.flops == 2 * 6 * 3 * 1536 * 2560


# Choosing


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("choice", [default, everything])
def test_no_two_cases_have_one_name(kind, choice):
    names = [(case.operation, case.shape) for case in choice(kind)]
    assert len(names) == len(set(names))


def test_operations_and_texts_narrow_the_choice():
    found = selected(default("cuda"), ["linear", "attention"], ["prefill", "tokens=64"])
    assert {case.operation for case in found} == {"linear", "attention"}
    assert all("prefill" in case.shape or "tokens=64" in case.shape for case in found)
    assert selected(default("cpu"), None, None) == default("cpu")


@pytest.mark.parametrize(
    ("operations", "texts", "said"), [(["matmul"], None, "add_rms_norm.*matmul"), (None, ["GPT-2"], "GPT-2.*--all")]
)
def test_an_empty_choice_says_what_there_is(operations, texts, said):
    with pytest.raises(ValueError, match=said):
        selected(default("cpu"), operations, texts)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Norm(LLAMA, "bfloat16", 8192), Goal("copy", 0.88)),
        (Norm(LLAMA, "bfloat16", 64), None),  # moves less than 64 MB
        (decode(LLAMA, "bfloat16", 64, 4096), Goal("copy", 0.85)),
        (decode(QWEN_SMALL, "bfloat16", 1, 32768), Goal("copy", 0.70)),
        (decode(SMOLLM2, "bfloat16", 64, 4096), None),
        (prefill(LLAMA, "bfloat16", 8192), Goal("TFLOP/s", 480)),
        (Linear(LLAMA, "bfloat16", 64, "down"), Goal("copy", 0.85)),
        (Linear(LLAMA, "bfloat16", 2048, "down"), Goal("torch", 0.90)),
    ],
)
def test_goals_belong_to_the_cases_of_the_issue(case, expected):
    assert goal(case, "cuda") == expected
    assert goal(case, "cpu") is None


# Comparing


def test_slower_is_what_takes_longer_than_noise_explains():
    cases = {"same": 2.0, "a bit": 2.09, "slower": 3.0, "much slower": 8.0, "faster": 1.0, "new": 5.0}
    now = [replace(MEASURED, shape=shape, seconds=1e-6 * value) for shape, value in cases.items()]
    old = {("linear", shape, "ours"): 2.0 for shape in cases if shape != "new"}
    assert [(key[1], before, round(after, 3)) for key, before, after in slower(old, now)] == [
        ("much slower", 2.0, 8.0),
        ("slower", 2.0, 3.0),
    ]
    assert comparison(old, now).startswith("2 of 5")


def test_goals_are_met_by_right_results_only():
    torch = replace(MEASURED, provider="torch", seconds=1.9e-3)
    goals = {("linear", "Llama-3-8B qkv"): Goal("torch", 0.9)}

    def said(ours):
        return goal_rows(goals, [ours, torch], PEAKS)[0][2:]

    assert said(MEASURED) == ["95.0%", "met"]
    assert said(replace(MEASURED, seconds=3e-3)) == ["63.3%", "**missed**"]
    assert said(replace(MEASURED, problem="wrong: relative error 1")) == ["-", "not measured"]


def test_a_share_is_of_the_peak_that_binds():
    assert MEASURED.share(PEAKS) == pytest.approx(0.5)  # 1 GB at 1 TB/s is 1 ms
    dense = replace(MEASURED, flops=10**12)
    assert (dense.bound(PEAKS), dense.share(PEAKS)) == ("arithmetic", pytest.approx(5.0))


# Running


class Wrong(NumPy):
    """Computes zeros, and no activations."""

    name = "wrong"

    def rms_norm(self, case, tensors):
        return lambda: np.zeros_like(tensors["x"])

    def silu_mul(self, case, tensors):
        raise OSError("out of order\nand more")


@pytest.fixture
def on_numpy(monkeypatch):
    """A machine that has no GPU, and two small cases to choose from."""
    monkeypatch.setattr(program, "open_machine", NumpyMachine)
    monkeypatch.setattr(
        program, "default", lambda kind: [Norm(SMOLLM2, "float32", 2), Activation(SMOLLM2, "float32", 2)]
    )


def test_wrong_results_and_failures_are_reported_and_do_not_end_the_run(on_numpy):
    machine = NumpyMachine()
    providers = [Wrong(machine), *opened(["ours"], machine)[0]]
    norm, activation = (list(program.measured(case, machine, providers, PEAKS)) for case in program.default("cpu"))
    assert [m.problem for m in norm] == ["wrong: relative error 1", ""]
    assert [m.problem for m in activation] == ["OSError: out of order", ""]
    assert activation[0].seconds is None
    assert activation[1].seconds > 0


def test_a_provider_that_is_not_there_is_named_with_the_reason():
    found, missing = opened(["numpy", "liger"], object())
    assert not found
    assert missing["numpy"] == f"{Unavailable.__name__}: measured on a CPU only"


@pytest.mark.parametrize("case", [mixed(SMOLLM2, "float32", 2, 70, 5), Rope(QWEN_SMALL, "float32", 3)], ids=str)
def test_numpy_and_our_kernels_compute_what_the_reference_says(case):
    machine = NumpyMachine()
    measured = program.measured(case, machine, opened(["ours", "numpy"], machine)[0], PEAKS)
    assert [(m.provider, m.problem) for m in measured] == [("ours", ""), ("numpy", "")]


def test_a_run_writes_its_table_and_is_compared_with_itself(on_numpy, tmp_path, capsys):
    saved = tmp_path / "results" / "kernels.md"
    program.main(["--providers", "ours", "numpy", "--save", str(saved)])
    rows = list(csv.DictReader(x for x in saved.with_suffix(".csv").open() if not x.startswith("#")))
    assert [(row["operation"], row["provider"]) for row in rows] == [
        ("rms_norm", "ours"), ("rms_norm", "numpy"), ("silu_mul", "ours"), ("silu_mul", "numpy"),
    ]  # fmt: skip
    assert all(float(row["least"]) <= float(row["microseconds"]) <= float(row["greatest"]) for row in rows)
    assert set(read_microseconds(saved.with_suffix(".csv"))) == {
        (row["operation"], row["shape"], row["provider"]) for row in rows
    }
    assert "| SmolLM2-135M tokens=2 |" in saved.read_text()
    if importlib.util.find_spec("matplotlib"):
        assert all((saved.parent / f"kernels_{kind}.png").stat().st_size for kind in ("roofline", "bars"))
    program.main(["--op", "rms_norm", "--providers", "ours", "--compare", str(saved.with_suffix(".csv"))])
    assert "of 1 measurements that both runs have" in capsys.readouterr().out
