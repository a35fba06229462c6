"""Typed reading of a raw config.json: every wrong value is an error that names its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa.errors import GqaError

MAX_LAYERS = 1 << 14
MAX_HEADS = 1 << 20
MAX_WIDTH = 1 << 24
MAX_TOKENS = 1 << 40


class Values:
    """The values of a JSON object. `keys` of the methods are spellings of one meaning, the usual one first."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def number(self, keys: tuple[str, ...], most: int, least: int = 1) -> int:
        value = self.number_or_none(keys, most, least)
        if value is None:
            raise GqaError(
                f"the config of {self.name} has no {keys[0]}",
                got=f"keys {short(sorted(map(str, self.config)))}",
                hint="is this the config.json of a decoder model?",
            )
        return value

    def number_or_none(self, keys: tuple[str, ...], most: int, least: int = 1) -> int | None:
        found: dict[str, int] = {}
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise self.error(key, value, f"a whole number from {least} to {most}")
            found[key] = value
        if len(set(found.values())) > 1:
            raise GqaError(f"the config of {self.name} contradicts itself", got=found)
        return next(iter(found.values()), None)

    def flag_or_none(self, key: str) -> bool | None:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "true, false")
        return value

    def numbers_or_none(self, key: str, most: int) -> list[int] | None:
        """A list of whole numbers from 0 to `most`."""
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= most for item in value):
            raise self.error(key, value, f"a list of whole numbers from 0 to {most}")
        return value

    def part_or_none(self, key: str) -> Values | None:
        """The JSON object below `key`."""
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object")
        return Values(value, f"{self.name}, {key}")

    def error(self, key: str, value: object, allowed: str) -> GqaError:
        return GqaError(f"{key} in the config of {self.name} makes no sense", got=short(value), allowed=allowed)


def short(value: object) -> str:
    """`repr`, cut where it would fill a terminal."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
