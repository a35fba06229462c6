"""Which text a conversion is fitted on, measured on and distilled on.

Sources are cut into blocks, which take turns: fits get the first ones, the measurement those after them, and a
distillation all but the measurement's. So nothing that is measured was seen by a fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from gqa.convert.recipe import Recipe
from gqa.errors import GqaError

# (how many blocks, tokens of each) -> at most so many blocks of token ids (N, L), in a random order
Cut = Callable[[int, int], np.ndarray]

# Of a text that is too short, one block in so many is kept for the measurement.
_FEWEST_FITTED = 8


@dataclasses.dataclass(frozen=True)
class ConversionText:
    """windows (recipe.all_windows, recipe.window): token ids for the fits, then those for the measurement;
    distill_windows (recipe.distill_windows, recipe.distill_window), in the order of training, None without a
    distillation. recipe: the one asked for, with the tokens that there are. tokens: of all blocks, each counted once;
    `distill_rounds`: how often the distillation reads its text."""

    recipe: Recipe
    windows: np.ndarray
    distill_windows: np.ndarray | None
    tokens: int
    distill_rounds: float


def conversion_text(sources: Sequence[Cut], recipe: Recipe) -> ConversionText:
    """Cut equal numbers of blocks from all sources, as far as each goes, for what the recipe asks for.

    A block is a whole number of windows of either kind. Where the sources are too short, fits and measurement get
    fewer windows, and the distillation reads its text again, each time in another order.
    Raises GqaError for a text that is shorter than one batch of the distillation.
    """
    block = math.lcm(recipe.window, recipe.distill_window) if recipe.distill_tokens else recipe.window
    fitted = -(-recipe.windows * recipe.window // block)
    measured = -(-(recipe.all_windows - recipe.windows) * recipe.window // block)
    distilled = -(-recipe.distill_windows * recipe.distill_window // block)
    wanted = max(fitted, distilled) + measured
    each = -(-wanted // len(sources))
    cut = [source(each, block) for source in sources]
    turns = itertools.zip_longest(*cut)
    blocks = np.stack([one for turn in turns for one in turn if one is not None][:wanted])
    batch = -(-recipe.distill_batch * recipe.distill_window // block) if distilled else 0
    least = max(fitted, batch)
    if len(blocks) < least + measured:
        spare = len(blocks) // _FEWEST_FITTED if least else len(blocks)
        measured = min(measured, spare)
        fitted = len(blocks) - measured
    fit, measure = (_pieces(some, recipe.window) for some in (blocks[:fitted], blocks[fitted : fitted + measured]))
    fit, measure = fit[: recipe.windows], measure[: recipe.all_windows - recipe.windows]
    fewer = {name: min(getattr(recipe, name), fit.size) for name in ("calibration_tokens", "refine_tokens")}
    recipe = dataclasses.replace(recipe, **fewer, measure_tokens=measure.size)
    windows, distill, rounds = np.concatenate([fit, measure]), None, 0.0
    if recipe.distill_tokens:
        rest = _pieces(np.concatenate([blocks[:fitted], blocks[fitted + measured :]]), recipe.distill_window)
        if len(rest) < recipe.distill_batch:
            raise GqaError(
                "the text is shorter than one batch of the distillation",
                got=f"{len(rest)} windows of {recipe.distill_window} tokens",
                allowed=f"{recipe.distill_batch} windows or more, beside those of the measurement",
                hint="give more text, or a smaller --distill-batch or --distill-window",
            )
        random = np.random.default_rng(recipe.seed)
        rounds = recipe.distill_windows / len(rest)
        order = np.concatenate([random.permutation(len(rest)) for _ in range(math.ceil(rounds))])
        distill = rest[order[: recipe.distill_windows]]
    return ConversionText(recipe, windows, distill, blocks.size, rounds)


def _pieces(blocks: np.ndarray, window: int) -> np.ndarray:
    """(N, L) -> (N * L / T, T)"""
    return blocks.reshape(-1, window)
