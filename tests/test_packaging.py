"""What can be checked of the package from outside: what it loads, and that its tools agree on what exists."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numba", "triton", "transformers", "altair", "vl_convert"}
LIGHT_LAYERS = (
    "errors",
    "units",
    "progress",
    "record",
    "text",
    "source",
    "hardware",
    "config",
    "plan",
    "report",
    "cli",
)


def light_modules() -> list[str]:
    """The package itself and every module of the layers that must start at once."""
    files = [path for layer in LIGHT_LAYERS for path in (ROOT / "src/gqa" / layer).rglob("*.py")]
    files += [ROOT / f"src/gqa/{layer}.py" for layer in LIGHT_LAYERS if (ROOT / f"src/gqa/{layer}.py").exists()]
    names = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__") for path in files]
    return ["gqa", *sorted(names)]


def test_light_layers_load_nothing_heavy() -> None:
    # One process for all: each import is followed by a look at what it dragged in.
    script = (
        "import importlib, sys\n"
        f"for name in {light_modules()!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_help_loads_neither_torch_nor_any_command() -> None:
    script = (
        "import sys\n"
        "from gqa.cli.main import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "print(sorted(name for name in sys.modules if name.startswith('gqa.cli.')))\n"
        f"assert not {HEAVY!r} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "['gqa.cli.main', 'gqa.cli.output']"


def test_constraints_pin_every_declared_dependency_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    declared += project["project"]["optional-dependencies"]["eval"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.partition("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")]
    names = {requirement.partition(">")[0].partition("[")[0].lower().replace("_", "-") for requirement in declared}
    assert names <= set(pins)
    assert len(pins) == len(set(pins))
    assert not [line for line in lines if "+" in line.partition("#")[0]], "a local version tag fits one index only"


@pytest.mark.parametrize("task", ["help", "demo", "test", "lint", "bench", "bench-gpu", "clean"])
def test_make_knows_the_task(task: str) -> None:
    run = subprocess.run(["make", "--dry-run", task], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_command_in_the_help_exists() -> None:
    from gqa.cli.main import COMMANDS

    missing = [name for name in COMMANDS if importlib.util.find_spec(f"gqa.cli.{name}") is None]
    assert not missing
