"""Which windows fits, measurement and distillation get. Letters: N blocks, L tokens of a block."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa.convert.recipe import make_recipe
from gqa.convert.texts import conversion_text


def numbered(first, available):
    """A source whose every token is a number of its own."""

    def cut(count, tokens):
        have = min(count, available // tokens)
        return first + np.arange(have * tokens).reshape(have, tokens)

    return cut


@given(
    window=st.sampled_from([4, 6]),
    distill_window=st.sampled_from([4, 8, 12]),
    fitted=st.integers(1, 9),
    measured=st.integers(1, 5),
    distilled=st.integers(1, 60),
    texts=st.lists(st.integers(150, 2000), min_size=1, max_size=3),
)
def test_what_is_measured_is_neither_fitted_nor_trained_on(window, distill_window, fitted, measured, distilled, texts):
    recipe = make_recipe(
        1,
        calibration_tokens=fitted * window,
        window=window,
        measure_tokens=measured * window,
        distill_tokens=distilled * distill_window,
        distill_window=distill_window,
        distill_batch=1,
    )
    sources = [numbered(10_000 * n, size) for n, size in enumerate(texts)]
    cut = conversion_text(sources, recipe)
    assert cut.windows.shape == (cut.recipe.all_windows, window)
    assert cut.distill_windows is not None
    assert cut.distill_windows.shape == (recipe.distill_windows, distill_window)
    fit, measure = cut.windows[: cut.recipe.windows], cut.windows[cut.recipe.windows :]
    assert not set(measure.flat) & set(fit.flat)
    assert not set(measure.flat) & set(cut.distill_windows.flat)
    assert len(set(fit.flat)) == fit.size
    assert np.all(np.diff(cut.distill_windows) == 1)  # windows are pieces of the text
    rounds = np.unique(cut.distill_windows, return_counts=True)[1]
    assert rounds.max() - rounds.min() <= 1  # all of it is read before any is read again


def test_two_sources_give_equal_parts():
    recipe = make_recipe(1, calibration_tokens=40, window=4, distill_tokens=80, distill_window=4, distill_batch=1)
    cut = conversion_text([numbered(0, 1000), numbered(10_000, 1000)], recipe)
    assert cut.distill_windows is not None
    for windows in (cut.windows, cut.distill_windows):
        assert (windows >= 10_000).mean() == 0.5


def test_a_text_that_is_too_short_keeps_an_eighth_for_the_measurement():
    recipe = make_recipe(1, calibration_tokens=400, window=4, measure_tokens=100)
    cut = conversion_text([numbered(0, 64)], recipe)
    assert (cut.recipe.calibration_tokens, cut.recipe.measure_tokens) == (56, 8)
    assert cut.distill_windows is None


def test_a_distillation_without_fits_or_measurement():
    recipe = make_recipe(1, "mean", window=4, distill_tokens=80, distill_window=4, distill_batch=1)
    cut = conversion_text([numbered(0, 1000)], recipe)
    assert cut.windows.size == 0
    assert cut.distill_windows is not None
    assert cut.distill_windows.size == 80
    assert cut.distill_rounds == pytest.approx(1)
