"""The pytest half of `bench/triton_tests.py`: upstream's tests, which expect a GPU, see CPU tensors instead.

What is put right, and nothing else: a tensor asked for on "cuda" is made on the CPU (many tests name the device), there
is nothing to synchronise, and `run_in_process` does the same in its child. Results go out as they come, a JSON line
each, so that a crash loses none.

SELECT names a JSON file with the ids of the tests to run; none: collect only. RESULTS names the file of results.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


class CudaIsCPU(TorchFunctionMode):
    """Every "cuda", and every device by number, reads "cpu" in PyTorch's functions; `tensor.cuda()` is the tensor."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), keywords: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        keywords = {name: _on_cpu(value) for name, value in (keywords or {}).items()}
        if isinstance(keywords.get("device"), int):
            keywords["device"] = "cpu"
        return function(*map(_on_cpu, args), **keywords)


def _on_cpu(value: Any) -> Any:
    on_gpu = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if on_gpu else value


def act_as_cpu() -> None:
    CudaIsCPU().__enter__()
    torch.cuda.synchronize = lambda device=None: None
    torch.cpu.current_device = torch.accelerator.current_device_index = lambda: 0  # PyTorch says "cpu", the backend 0


def _child(*arguments: Any) -> None:
    """Runs in a process that a test starts."""
    import triton._internal_testing

    act_as_cpu()
    triton._internal_testing._run_in_process_worker(*arguments)


def pytest_configure(config: pytest.Config) -> None:
    import triton._internal_testing as upstream

    act_as_cpu()
    if not os.environ.get("DISABLE_SUBPROCESS"):
        upstream._run_in_process_worker = _child
    for marker in ("interpreter", "cpu", "enable_warmup", "disable_warmup"):
        config.addinivalue_line("markers", f"{marker}: upstream's")


def _write(**result: Any) -> None:
    with Path(os.environ["RESULTS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not os.environ.get("SELECT"):
        for item in items:
            _write(id=item.nodeid)
        return
    wanted = set(json.loads(Path(os.environ["SELECT"]).read_text(encoding="utf-8")))
    items[:] = [item for item in items if item.nodeid in wanted]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(id=report.nodeid, outcome="failed", text=str(report.longrepr))
    elif report.skipped:
        _write(id=report.nodeid, outcome="skipped", text=str(report.longrepr[2]))


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _write(id=nodeid, outcome="started")


def _source(test: Any) -> str:
    test = inspect.unwrap(test)  # of some tests, it is a kernel
    return str(getattr(test, "src", "")) or inspect.getsource(test)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = (yield).get_result()
    if report.when == "call" or not report.passed:
        text = str(report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else report.longrepr)
        source = _source(item.obj) if report.failed and hasattr(item, "obj") else ""
        error = f"{call.excinfo.typename}: {call.excinfo.value}" if call.excinfo else ""
        _write(
            id=item.nodeid,
            outcome=report.outcome,
            text=text if report.skipped else text[-8000:],
            error=error[-4000:],
            source=source,
            seconds=round(call.duration, 2),
        )
