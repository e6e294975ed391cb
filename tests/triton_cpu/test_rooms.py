"""The compiler's modules know each other in one direction, and its table of operations is whole."""

import ast
import inspect
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastdeploy.triton_cpu as backend
from fastdeploy.triton_cpu.emitter import LOWERINGS, MODULES
from fastdeploy.triton_cpu.operations import OPERATIONS, Kind

FOLDER = Path(backend.__file__).parent


def imports(module: Path) -> set[str]:
    """The modules of this folder that one imports, anywhere in it: for its types alone, or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found.update([node.module] if node.module else [alias.name for alias in node.names])
    return {name for name in found if (FOLDER / f"{name}.py").exists()}


GRAPH = {path.stem: imports(path) for path in FOLDER.glob("*.py")}


def test_imports_run_one_way() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises CycleError with the circle


def test_the_readme_names_every_file() -> None:
    named = set(re.findall(r"\w+", (FOLDER / "README.md").read_text()))
    assert {path.stem for path in FOLDER.glob("*.[pch]*")} - named == {"__init__"}


def test_a_lowering_knows_no_other_lowering_and_not_the_driver() -> None:
    lowerings = {module.__name__.rpartition(".")[2] for module in MODULES}
    assert len(lowerings) > 5
    for name in lowerings:
        assert not GRAPH[name] & (lowerings | {"emitter"}), name


def test_the_table_is_below_everything_that_writes_code() -> None:
    assert GRAPH["operations"] == {"elements", "libdevice", "ttir"}
    assert "operations" in GRAPH["context"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_row_is_computed_or_written(name: str) -> None:
    row = OPERATIONS[name]
    if row.kind is Kind.STANDS:
        assert LOWERINGS[name] and not row.scalar and not row.vector
        assert all(next(iter(inspect.signature(write).parameters)) == "context" for write in LOWERINGS[name])
    else:
        assert not row.lowerings and not row.writes
        assert bool(row.scalar) == (row.kind is Kind.LANEWISE) or name == "arith.constant"
