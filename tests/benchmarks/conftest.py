"""The benchmark scripts as modules: they lie outside the package and import one another by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script() -> Any:
    def load(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(SCRIPTS)
            for variable in ("OMP_WAIT_POLICY", "JAX_PLATFORMS"):  # cpu.py sets them for its own process
                patch.setenv(variable, "")
            return importlib.import_module(name)

    return load
