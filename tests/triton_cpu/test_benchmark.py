"""triton.testing and triton.autotune, on a CPU and without PyTorch."""

import time

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.testing import do_bench, do_bench_cudagraph

from fastdeploy.triton_cpu import toolchain
from fastdeploy.triton_cpu.runtime import record

from .arrays import Tensor


class Clock:
    """time.perf_counter, in which the n-th call of a function takes `milliseconds[n]`, over and over."""

    def __init__(self, *milliseconds):
        self.milliseconds, self.calls, self.now = milliseconds, 0, 100.0

    def __call__(self):
        return self.now

    def function(self):
        self.now += self.milliseconds[self.calls % len(self.milliseconds)] / 1e3
        self.calls += 1


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(1, 2, 3, 4, 5)
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.mark.parametrize("bench", [do_bench, do_bench_cudagraph])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 3.0),
        ({"return_mode": "min"}, 1.0),
        ({"return_mode": "max"}, 5.0),
        ({"return_mode": "median"}, 3.0),
        ({"quantiles": [0.5]}, 3.0),
        ({"quantiles": [0, 0.5, 1]}, [1.0, 3.0, 5.0]),
    ],
)
def test_milliseconds_as_asked_for(bench, options, expected, clock):
    assert bench(clock.function, rep=46, **options) == pytest.approx(expected)  # 15 runs of 3 ms on average


def test_warmup_and_rep_say_how_long_is_measured(clock):
    assert len(do_bench(clock.function, warmup=10, rep=61, return_mode="all")) == 20
    assert clock.calls == 1 + 5 + 3 + 20


def test_gradients_are_forgotten_between_runs(clock):
    class Weight:
        grad = None

    weight, seen = Weight(), []

    def function():
        seen.append(weight.grad)
        weight.grad = 1
        clock.function()

    do_bench_cudagraph(function, rep=31, grad_to_none=[weight])
    assert seen[-10:] == [None] * 10


def _kernel(**how):
    """A kernel with an autotuner of its own."""

    def decorate(function):
        return triton.autotune(**{"key": ["n"], **how})(triton.jit(function))

    return decorate


def add_kernel(x_ptr, n, BLOCK: tl.constexpr, STEP: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, i < n) + STEP, i < n)


def _configs(**more):
    sizes, warps = [(64, 1), (128, 2)], [(1, 1, 1), (4, 1, 1), (4, 3, 1), (8, 5, 2)]
    return [
        triton.Config({"BLOCK": block, "STEP": step}, num_warps=warps_, num_stages=stages, num_ctas=ctas, **more)
        for block, step in sizes
        for warps_, stages, ctas in warps
    ]


def _grid(meta):
    return (triton.cdiv(meta["n"], meta["BLOCK"]),)


@pytest.fixture
def measured(monkeypatch):
    """How often something was measured, in which every measurement takes longer than the one before."""
    found = []

    def measure(function, quantiles):
        function()
        found.append(len(found))
        return [1.0 + len(found)] * 3

    monkeypatch.setattr(triton.testing, "do_bench", measure)
    return found


def test_an_autotuned_kernel_runs_as_its_best_configuration():
    x = Tensor(np.zeros(256, np.float32))
    kernel = _kernel(configs=_configs(), restore_value=["x_ptr"])(add_kernel)
    kernel[_grid](x, 200)
    step = kernel.best_config.kwargs["STEP"]
    np.testing.assert_array_equal(x.stored, np.where(np.arange(256) < 200, step, 0))


def test_configurations_of_the_same_machine_code_are_compiled_and_measured_once(measured, monkeypatch):
    compiled = []
    compile_ = toolchain.Toolchain.compile
    monkeypatch.setattr(toolchain.Toolchain, "compile", lambda *a: compiled.append(a) or compile_(*a))
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    x = Tensor(np.zeros(256, np.float32))
    kernel = _kernel(configs=_configs())(add_kernel)
    kernel[_grid](x, 200)
    assert len(measured) == 2 and len(compiled) <= 2 and len(kernel.configs_timings) == 8
    assert kernel.best_config.kwargs["BLOCK"] == 64
    kernel[_grid](x, 100)
    assert len(measured) == 4


def test_what_a_configuration_asks_of_a_gpu_means_nothing():
    out = Tensor(np.zeros(8, np.int32))
    options = {"num_warps": 8, "maxnreg": 64, "waves_per_eu": 2, "matrix_instr_nonkdim": 16, "kpack": 2}
    count_kernel[(8,)](out, **options)
    np.testing.assert_array_equal(out.stored, np.arange(8))
    with pytest.raises(KeyError, match="waves_per_ue"):
        count_kernel[(8,)](out, waves_per_ue=2)


@triton.jit
def count_kernel(out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.program_id(0))


def test_values_are_reset_or_restored_around_each_run():
    x = Tensor(np.ones(256, np.float32))
    _kernel(configs=_configs(), restore_value=["x_ptr"])(add_kernel)[_grid](x, 256)
    assert x.stored[0] in (2, 3)
    _kernel(configs=_configs(), reset_to_zero=["x_ptr"])(add_kernel)[_grid](x, 256)
    assert x.stored[0] in (1, 2)


def test_hooks_of_configurations_and_of_the_autotuner_are_called(measured):
    seen = []
    configs = _configs(pre_hook=lambda arguments: seen.append(arguments["BLOCK"]))
    ends = []
    kernel = _kernel(configs=configs, post_hook=lambda arguments, exception: ends.append(exception))(add_kernel)
    kernel[_grid](Tensor(np.zeros(256, np.float32)), 256)
    assert set(seen) == {64, 128} and seen[-1] == 64
    assert set(ends) == {None} and len(ends) == len(seen) - 1  # not behind the call that counts


def test_configurations_are_pruned(measured):
    pruned = {"early_config_prune": lambda configs, named, **more: configs[4:]}
    kernel = _kernel(configs=_configs(), prune_configs_by=pruned)(add_kernel)
    kernel[_grid](Tensor(np.zeros(256, np.float32)), 256)
    assert kernel.best_config.kwargs["BLOCK"] == 128 and len(kernel.configs_timings) == 4
    ranked = {"perf_model": lambda BLOCK, **more: -BLOCK, "top_k": 2}
    kernel = _kernel(configs=_configs(), prune_configs_by=ranked)(add_kernel)
    kernel[_grid](Tensor(np.zeros(256, np.float32)), 256)
    assert kernel.best_config.kwargs["BLOCK"] == 128 and len(kernel.configs_timings) == 2


def test_results_are_cached_on_disk(measured, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        kernel = _kernel(configs=_configs(), cache_results=True)(add_kernel)
        kernel[_grid](Tensor(np.zeros(256, np.float32)), 256)
        assert len(measured) == 2 and len(kernel.configs_timings) == 8


def test_within_a_recording_only_the_best_configuration_is_recorded():
    x = Tensor(np.zeros(256, np.float32))
    kernel = _kernel(configs=_configs(), reset_to_zero=["x_ptr"])(add_kernel)
    with record() as plan:
        kernel[_grid](x, 256)
    assert len(plan) == 1 and not x.stored.any()
    plan.replay()
    np.testing.assert_array_equal(x.stored, kernel.best_config.kwargs["STEP"])


def test_a_kernel_that_fails_ends_the_tuning_with_its_error():
    with pytest.raises(ValueError, match="data_ptr"):
        _kernel(configs=_configs())(add_kernel)[_grid](_Nowhere(np.zeros(4)), 4)


class _Nowhere(Tensor):
    shape = (4,)

    def data_ptr(self):
        return 0
