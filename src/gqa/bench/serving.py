"""What `gqa bench MODEL --memory` measures, as a record: density over the dial, and a soak."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gqa.bench.commit import commit
from gqa.bench.density import DTYPE_NAMES, Memory, measure_density
from gqa.bench.device import measure_device
from gqa.bench.document import ABOUT_DENSITY, ABOUT_SOAK, record
from gqa.bench.generation import sharing_copy
from gqa.bench.soak import soak
from gqa.bench.this_device import measured_device
from gqa.config import ModelShape
from gqa.model import hf
from gqa.progress import Progress, silent
from gqa.record import Record


@dataclasses.dataclass(frozen=True)
class Soaking:
    """A soak of `model`, a loaded transformers model, for so many seconds: as `gqa.bench.soak.soak` takes it."""

    model: Any
    seconds: float
    seed: int = 0
    text: Sequence[int] = ()


def bench_serving(
    dial: Sequence[tuple[ModelShape, Callable[[], Any]]],
    memory: Memory,
    context: int,
    *,
    device: str = "cpu",
    soaking: Soaking | None = None,
    repeats: int = 20,
    inputs: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> Record:
    """Measure the limits of a device, the density at every stop of the dial, and a soak if one is asked for.

    dial: a shape and what makes a model of it on the device; one model at a time is held.
    The record's results: machine, density (a flat row per stop), soak (a flat row, or None). Raises GqaError like the
    measurements.
    """
    hf.register()
    measured = commit()  # what runs from here on, whatever the checkout becomes in an hour
    limits = measure_device(device)
    read = limits.read if device == "cpu" else None  # on a GPU a copy may be faster, and its clock is another
    rows = []
    for shape, make in dial:
        model = sharing_copy(make(), hf.NAME)
        target = measured_device(limits.machine, DTYPE_NAMES.get(model.dtype, "fp32"))
        rows.append(
            measure_density(model, shape, memory, context, target, read=read, repeats=repeats, progress=progress)
        )
        del model
    soaked = None
    if soaking is not None:
        model = sharing_copy(soaking.model, hf.NAME)
        soaked = soak(model, memory, context, soaking.seconds, seed=soaking.seed, text=soaking.text, progress=progress)
    return record(
        "bench",
        (inputs or {}) | {"device": device, "repeats": repeats, "commit": measured},
        {"machine": dataclasses.asdict(limits.machine), "density": rows, "soak": soaked},
        ABOUT_DENSITY + (ABOUT_SOAK if soaking else ()),
    )
