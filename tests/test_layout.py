"""Who imports whom: scripts at the top, the paper's five files at the bottom, folders between."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train_toy", "train_sdxl", "sample", "bench"}
FOLDERS = {"sdxl", "training", "toy", "cifar", "common", "benchmarks"}
MAY_IMPORT = {
    "unet": set(), "solvers": set(), "tdd": {"solvers"}, "tcd": {"solvers"},
    "tdm": {"solvers", "tdd"},
    "common": {"tdd", "solvers", "tcd", "tdm", "unet"},
}  # fmt: skip
NEVER = {
    "sdxl": {"training", "toy", "cifar", "benchmarks"}, "training": {"toy", "cifar", "benchmarks"},
    "toy": {"cifar", "sdxl", "training", "benchmarks"}, "cifar": {"toy", "benchmarks"},
}  # fmt: skip
FILES = [p for p in ROOT.glob("*.py") if not p.name.startswith(("test_", "conftest"))]
FILES += [p for folder in FOLDERS for p in (ROOT / folder).glob("*.py")]
FILES.sort()


def imports(path):
    """The modules of this project that a file imports, as "folder.module" or "module"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {name for name in inner if (ROOT / f"{name.replace('.', '/')}.py").exists()}
            found |= files or {node.module}
    return {name for name in found if (ROOT / f"{name.replace('.', '/')}.py").exists()}


GRAPH = {".".join(p.relative_to(ROOT).with_suffix("").parts): imports(p) for p in FILES}


@pytest.mark.parametrize("name", GRAPH)
def test_imports_point_downwards(name):
    place, tops = name.split(".")[0], {other.split(".")[0] for other in GRAPH[name]}
    assert not tops & SCRIPTS, "a script at the root is imported"
    allowed = MAY_IMPORT.get(place, FOLDERS | {"tdd", "solvers", "tcd", "tdm", "unet"})
    assert tops - {place} <= allowed - NEVER.get(place, set())


def test_no_cycles():
    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        for other in GRAPH[name]:
            visit(other, [*above, name])

    for name in GRAPH:
        visit(name, [])


def test_the_2d_experiment_imports_nothing_of_images():
    call = [sys.executable, "-X", "importtime", "train_toy.py", "--help"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and {"tdd", "toy.students"} <= modules
    assert not {m for m in modules if m.split(".")[0] in ("sdxl", "training", "cifar")}
