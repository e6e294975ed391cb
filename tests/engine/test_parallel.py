"""Ranks as processes: the same tokens as one, and nobody left behind when something dies."""

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest

from fastdeploy import LLM, SamplingParams
from fastdeploy.device import PeerLost
from fastdeploy.engine import parallel
from fastdeploy.engine.parallel import Leader, RankFailed, reserved_port, uninterrupted
from tests.models.test_families import STORED, TOLERANCE, certain, chosen, greedy, open_llm, write_model
from tests.references.families import CASES, prompts

PROMPT = [3, 1, 4, 1, 5]
LONG = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
PATIENCE = 40  # seconds within which everybody has to have ended


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    with open_llm(tmp_path, CASES["llama"], dtype="float32", tensor_parallel_size=2) as llm:
        yield llm


def ranks_of(llm: LLM) -> dict[int, int]:
    """The process ids of the other ranks."""
    assert llm._leader is not None
    return {rank: process.pid for rank, process in llm._leader.processes.items()}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(pids: list[int]) -> None:
    end = time.monotonic() + PATIENCE
    while any(map(is_running, pids)):
        assert time.monotonic() < end, f"still running: {list(filter(is_running, pids))}"
        time.sleep(0.05)


def check(llm: LLM, name: str) -> None:
    """The references of transformers, as test_families.py asks for them of one rank."""
    for reference, output in zip(STORED[name], greedy(llm, prompts(CASES[name])), strict=True):
        count = certain(reference)
        assert output.outputs.token_ids[:count] == reference["token_ids"][:count]
        found = chosen(output.prompt_logprobs[1:]) + chosen(output.outputs.logprobs[:count])
        np.testing.assert_allclose(found, reference["prompt_logprobs"] + reference["logprobs"][:count], atol=TOLERANCE)


def test_two_models_of_two_ranks_each_answer_side_by_side(tmp_path: Path) -> None:
    names = ("llama", "qwen3")
    llms = []
    for name in names:
        (tmp_path / name).mkdir()
        llms.append(open_llm(tmp_path / name, CASES[name], dtype="float32", tensor_parallel_size=2))
    pids = [pid for llm in llms for pid in ranks_of(llm).values()]
    assert len(set(pids)) == 2 and all(map(is_running, pids))
    with llms[0], llms[1]:
        begun = llms[0].generate(PROMPT, LONG, stream=True)  # the first one is in the middle of something
        next(begun)
        check(llms[1], names[1])
        check(llms[0], names[0])
        assert len(list(begun)[-1].outputs.token_ids) == 50
    wait_until_ended(pids)


@pytest.mark.parametrize(
    ("name", "ranks", "killed"),
    [("llama", 2, 1), ("llama, tied, 9 heads on 3, biases", 3, 1), ("llama, tied, 9 heads on 3, biases", 3, 2)],
)
def test_a_rank_that_is_killed_ends_the_call_with_its_name_and_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ranks: int, killed: int
) -> None:
    monkeypatch.chdir(tmp_path)  # the ranks find this package from anywhere
    llm = open_llm(tmp_path, CASES[name], dtype="float32", tensor_parallel_size=ranks)
    pids = ranks_of(llm)
    stream = llm.generate(PROMPT, LONG, stream=True)
    next(stream)
    os.kill(pids[killed], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankFailed, match=rf"rank {killed} \(process {pids[killed]}\) was killed by SIGKILL"):
        list(stream)
    assert time.monotonic() - started < PATIENCE
    wait_until_ended(list(pids.values()))
    with pytest.raises(RankFailed, match="SIGKILL"):  # the same cause ever after
        llm.generate(PROMPT, LONG, use_tqdm=False)


@pytest.fixture
def processes() -> Iterator[dict[int, subprocess.Popen]]:
    """Rank 1 sleeps, rank 2 has ended because another one did."""
    ranks = {1: subprocess.Popen(["sleep", "100"]), 2: subprocess.Popen(["sh", "-c", f"exit {parallel.PEER_LOST}"])}
    yield ranks
    ranks[1].kill()
    ranks[1].wait()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PeerLost("timeout"), "rank 1 (process PID) is silent: it did not take part in a step"),
        (BlockingIOError("send"), "rank 1 (process PID) is silent: it did not take part in a step"),
        (TimeoutError("rank 1 has not answered"), "rank 0: TimeoutError: rank 1 has not answered"),
    ],
)
def test_a_silent_rank_is_named_and_so_is_a_stopped_one(
    processes: dict[int, subprocess.Popen], error: Exception, said: str
) -> None:
    leader = object.__new__(Leader)
    leader._pipes, leader.processes = {}, processes
    name = f"rank 1 (process {processes[1].pid})"
    assert leader._cause(error) == said.replace("PID", str(processes[1].pid))
    processes[1].send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, processes[1].pid, os.WSTOPPED | os.WNOWAIT)
    assert leader._cause(error) == f"{name} is stopped, by SIGSTOP or a debugger"
    assert leader._cause(ValueError("own")) == "rank 0: ValueError: own"


def test_a_rank_that_reads_nothing_does_not_keep_the_leader_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SILENCE_SECONDS", 1)
    ours, theirs = Pipe()
    with ours, theirs:
        parallel.limit_silence(ours)
        with pytest.raises(BlockingIOError):
            ours.send(bytes(10 << 20))


def test_an_llm_that_is_dropped_ends_its_ranks(tmp_path: Path) -> None:
    before = os.environ.get("PADDLE_TRAINER_ID")
    llm = open_llm(tmp_path, CASES["llama"], dtype="float32", tensor_parallel_size=2)
    assert llm._leader is not None
    processes = list(llm._leader.processes.values())
    assert os.environ.get("PADDLE_TRAINER_ID") == before
    del llm
    gc.collect()
    assert [process.returncode for process in processes] == [0]


def test_a_rank_that_fails_to_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Sabotaged(Leader):
        """The other rank doesn't find the model."""

        def __init__(self, config) -> None:
            super().__init__(dataclasses.replace(config, model=str(tmp_path / "elsewhere.gguf")))
            started.extend(process.pid for process in self.processes.values())

    monkeypatch.setattr(parallel, "Leader", Sabotaged)
    with pytest.raises(RankFailed, match=r"rank 1: FileNotFoundError: .*elsewhere\.gguf"):
        open_llm(tmp_path, CASES["llama"], dtype="float32", tensor_parallel_size=2)
    assert len(started) == 1
    wait_until_ended(started)


def test_sizes_that_cannot_be_divided_are_an_error_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "Leader", None)  # would be called to start something
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4: 6 query heads"):
        open_llm(tmp_path, CASES["llama"], dtype="float32", tensor_parallel_size=4)


def test_ranks_that_the_launcher_has_started(tmp_path: Path) -> None:
    """Each runs the script; LLM returns on rank 0 alone."""
    write_model(tmp_path, CASES["llama"])
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from fastdeploy import LLM
from tests.engine.test_parallel import check
if __name__ == "__main__":
    sizes = {{"max_model_len": 64, "block_size": 16, "max_num_seqs": 4}}
    with LLM({str(tmp_path)!r}, dtype="float32", tensor_parallel_size=2, **sizes) as llm:
        check(llm, "llama")
        print("checked")
""")
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(tmp_path)]
    with reserved_port() as port:
        command = [*launcher, "--master", f"127.0.0.1:{port}", str(script)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    logs = {path.name: path.read_text() for path in tmp_path.glob("workerlog.*")}
    assert ended.returncode == 0, (ended.stderr, logs)
    assert "checked" in logs["workerlog.0"] and "checked" not in logs["workerlog.1"]


def test_ranks_end_when_the_caller_is_killed(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from tests.engine.test_parallel import *
llm = open_llm(Path({str(tmp_path)!r}), CASES["llama"], dtype="float32", tensor_parallel_size=2)
print(*ranks_of(llm).values(), flush=True)
while True:
    llm.generate(PROMPT, LONG, use_tqdm=False)
"""
    caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    (pid,) = map(int, caller.stdout.readline().split())
    time.sleep(1)  # in the middle of a call, most likely
    caller.kill()
    caller.communicate()
    wait_until_ended([pid])


def test_ctrl_c_leaves_all_ranks_in_step(llm: LLM, ctrl_c: None) -> None:
    expected = llm.generate(PROMPT, LONG, use_tqdm=False)[0].outputs.token_ids
    for delay in (0.02, 0.05, 0.11):
        timer = threading.Timer(delay, signal.raise_signal, [signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            for _ in range(1000):
                llm.generate(PROMPT, LONG, use_tqdm=False)
        assert llm.generate(PROMPT, LONG, use_tqdm=False)[0].outputs.token_ids == expected


def test_an_interrupt_waits_for_the_end_of_the_block(ctrl_c: None) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    with uninterrupted():  # and none is left over
        pass
