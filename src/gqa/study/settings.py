"""What a study compares, and with how much text and time."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from gqa.config import ModelShape, check_kv_heads, kv_head_choices
from gqa.errors import GqaError

if TYPE_CHECKING:
    import numpy as np

    from gqa.convert.recipe import Recipe

# What is compared at every setting: the published baseline, the closed form, and that distilled.
METHODS = ("mean", "svd", "svd+distill")
BEST = METHODS[-1]
# What else is looked at in the models.
ANALYSES = ("gradients", "patterns")


@dataclasses.dataclass(frozen=True)
class Settings:
    """kv_heads: stops of the dial below the parent's (empty: every divisor). calibration_windows: for conversion.
    distill_tokens: of training text, for the distillation of every child. test_windows: for every evaluation.
    uptrain_tokens: for every child and for the control (0: no uptraining).
    contexts: where decoding is timed, in tokens, with decode_repeats steps each.
    analyses: which of ANALYSES are made; a study may be given again with more of them. budget: the dial is turned down
    from its top no further than to the first stop whose best child has a perplexity of more than 1 + budget times the
    parent's; None for every stop."""

    kv_heads: tuple[int, ...] = ()
    calibration_windows: int = 128
    test_windows: int = 128
    uptrain_tokens: int = 0
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768)
    distill_tokens: int = 131_072
    decode_repeats: int = 24
    seed: int = 0
    analyses: tuple[str, ...] = ANALYSES
    budget: float | None = None

    def for_model(self, shape: ModelShape) -> Settings:
        """The same with every stop named, the most KV heads first. GqaError for stops that are not below the model's
        own."""
        choices = [n for n in kv_head_choices(shape.query_heads) if n < shape.kv_heads]
        stops = self.kv_heads or tuple(choices)
        for stop in stops:
            check_kv_heads(shape, stop)
            if stop >= shape.kv_heads:
                raise GqaError(
                    f"{stop} KV heads are not fewer than the parent's {shape.kv_heads}",
                    allowed=", ".join(map(str, choices)),
                )
        return dataclasses.replace(self, kv_heads=tuple(sorted(set(stops), reverse=True)))

    @property
    def stages(self) -> int:
        """How often a child is evaluated: right after conversion, and after uptraining."""
        return 2 if self.uptrain_tokens else 1


def recipe_of(kv_heads: int, method: str, settings: Settings, calibration: np.ndarray) -> Recipe:
    """The conversion to `kv_heads` by one of METHODS; calibration (N, T): its text."""
    from gqa.convert.recipe import make_recipe
    from gqa.device import default_device, multiplies_bf16

    name, _, distilled = method.partition("+")
    window = calibration.shape[1]
    distillation = {
        "distill_tokens": settings.distill_tokens,
        "distill_window": window,
        "distill_precision": "bf16" if multiplies_bf16(default_device()) else "fp32",
    }
    return make_recipe(
        kv_heads,
        name,  # type: ignore[arg-type]
        calibration_tokens=0 if name == "mean" else calibration.size,
        window=window,
        seed=settings.seed,
        **(distillation if distilled else {}),
    )
