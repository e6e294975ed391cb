"""What bench.cpu makes of rates: which files are one model, what a ratio is to, and who may be left out."""

import argparse
from pathlib import Path

import pytest

from bench import cpu
from bench.cpu import EIGHT, MEMORY, ONE, Measured, Model, grouped, run, written
from bench.side_by_side import Results

RATES = {
    "fastdeploy Q4_0": [100.0, 120.0, 90.0],
    "fastdeploy Q4_K_M": [60.0],
    "llama_cpp Q4_0": [80.0],
    "llama_cpp Q4_K_M": [40.0],
    "openvino Q4_0": [50.0],
}


class Described(Model):
    """A model of which there are no files."""

    def parameters(self) -> int:
        return 600_000_000

    def weight_bytes(self, format: str) -> int:
        return 10**9

    @property
    def vocabulary(self) -> int:
        return 100


MODEL = Described("Qwen3-0.6B", {name: Path(f"Qwen3-0.6B-{name}.gguf") for name in ("Q4_0", "Q4_K_M")})


def measured() -> Measured:
    return Measured(Results({ONE: RATES}), {"fastdeploy Q4_0": 70.0, "llama_cpp Q4_0": 100.0}, bandwidth=200e9)


def cells(text: str, label: str, format: str) -> list[str]:
    """The cells of a row, after its label and format."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return next(row[2:] for row in rows if row[:2] == [label, format])


def test_files_that_differ_in_the_format_at_the_end_are_one_model():
    names = ("a/SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct.Q8_0", "qwen3-0.6b-q4_k_m", "tiny-F16")
    found = grouped(Path(f"{name}.gguf") for name in names)
    assert [(model.name, list(model.files)) for model in found] == [
        ("SmolLM2-135M-Instruct", ["Q4_1", "Q8_0"]),
        ("qwen3-0.6b", ["q4_k_m"]),
        ("tiny-F16", ["as-it-is"]),
    ]


def test_every_format_of_ours_is_held_against_the_fastest_format_of_any_peer():
    text = written(MODEL, measured())
    peers = ["80.0 (80.0-80.0) Q4_0", "50.0 (50.0-50.0) Q4_0"]
    row = f"{ONE}, tok/s"
    assert cells(text, row, "Q4_0") == ["100.0 (90.0-120.0)", *peers, "1.25", ">= 1.25", "met"]
    assert cells(text, row, "Q4_K_M") == ["60.0 (60.0-60.0)", *peers, "0.75", ">= 1.25", "missed"]


def test_memory_is_held_against_llama_cpp_in_the_same_format():
    text = written(MODEL, measured())
    assert cells(text, MEMORY, "Q4_0") == ["70", "100", "", "0.70", "<= 0.8", "met"]
    assert cells(text, MEMORY, "Q4_K_M") == ["", "", "", "", "", ""]


def test_what_is_read_is_a_share_of_the_bandwidth():
    found = cells(written(MODEL, measured()), "file read at batch 1, GB/s", "Q4_0")
    assert found == ["100.0", "", "", "0.50", ">= 0.9", "missed"]


def test_held_to_an_instruction_set_there_is_one_goal_for_all_speeds():
    text = written(MODEL, measured(), "avx2")
    assert cells(text, f"{ONE}, tok/s", "Q4_0")[-2:] == [">= 1.3", "missed"]
    assert cells(text, MEMORY, "Q4_0")[-3:] == ["0.70", "", ""]


def test_a_case_that_nobody_ran_has_no_fastest_format():
    assert measured().best(ONE, "llama_cpp") == "Q4_0"
    assert measured().best(EIGHT, "llama_cpp") is None


class Reader:
    """A worker that reads Q4_0 only."""

    def __init__(self, spec, options, *sizes):
        if "Q4_0" not in options.model:
            raise RuntimeError(f"{spec}: the process ended:\nTraceback\nRuntimeError: what a type")
        self.name, self.facts = spec, {"engine": f"{spec} 1.0"}

    def peak_mebibytes(self):
        return 5.0

    def close(self):
        pass


@pytest.fixture
def readers(monkeypatch):
    monkeypatch.setattr(cpu, "Worker", Reader)
    monkeypatch.setattr(cpu, "measure", lambda workers, *rest: Results({ONE: {one.name: [1.0] for one in workers}}))


def test_a_peer_that_cannot_read_a_file_is_left_out_with_its_reason(readers):
    found = Measured()
    run(found, MODEL, [("openvino", "Q4_0"), ("openvino", "Q4_K_M")], cpu.standard_cases(4), 1, argparse.Namespace())
    assert found.results.values == {ONE: {"openvino Q4_0": [1.0]}} and found.peaks == {"openvino Q4_0": 5.0}
    assert found.left_out == ["openvino, Qwen3-0.6B Q4_K_M: RuntimeError: what a type"]


def test_our_own_engine_is_never_left_out(readers):
    with pytest.raises(RuntimeError, match="what a type"):
        run(Measured(), MODEL, [("fastdeploy", "Q4_K_M")], cpu.standard_cases(4), 1, argparse.Namespace())
