"""Recipes: defaults, bounds, and a hash that stays."""

import pytest

from gqa.convert.card import convert_command
from gqa.convert.recipe import METHODS, Recipe, make_recipe
from gqa.errors import GqaError


@pytest.mark.parametrize(
    ("method", "grouping", "refit"),
    [
        ("svd", "search", True),
        ("procrustes", "search", True),
        ("mean", "contiguous", False),
        ("first", "contiguous", False),
        ("random", "contiguous", False),
    ],
)
def test_defaults_by_method(method, grouping, refit):
    with_text = make_recipe(2, method, calibration_tokens=1024)
    assert (with_text.grouping, with_text.refit) == (grouping, refit)
    assert make_recipe(2, method).refit is False
    assert with_text.baseline is not refit


def test_what_is_said_wins_over_the_defaults():
    recipe = make_recipe(2, "mean", grouping="search", refit=True, calibration_tokens=512)
    assert (recipe.grouping, recipe.refit, recipe.baseline) == ("search", True, False)
    assert make_recipe(2, refit=False, calibration_tokens=512).refit is False


def test_windows_cover_calibration_and_refinement():
    assert make_recipe(2).windows == 0
    assert make_recipe(2, calibration_tokens=1024, refine_tokens=4096, window=100).windows == 40


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_heads": 0}, "kv heads out of range"),
        ({"kv_heads": True}, "kv heads out of range"),
        ({"method": "median"}, "unknown method"),
        ({"grouping": "best"}, "unknown grouping"),
        ({"window": 1}, "window out of range"),
        ({"seed": -1}, "seed out of range"),
        ({"refine_steps": 0}, "refine steps out of range"),
        ({"refine_learning_rate": 0.0}, "learning rate out of range"),
        ({"refine_learning_rate": float("nan")}, "learning rate out of range"),
        ({"refit": True}, "refit compares with the parent on text"),
        ({"refine_tokens": 1024}, "refine compares with the parent on text"),
        ({"calibration_tokens": 255}, "fewer than one window"),
        ({"calibration_tokens": -1}, "calibration tokens out of range"),
        ({"calibration_tokens": 512, "refine_tokens": 100}, "refine tokens are fewer than one window"),
    ],
    ids=str,
)
def test_bounds(change, said):
    with pytest.raises(GqaError, match=said):
        Recipe(**{"kv_heads": 2, **change})


def test_hash_tells_recipes_apart_and_is_the_same_everywhere():
    recipes = [make_recipe(heads, method, seed=seed) for heads in (1, 2) for method in METHODS for seed in (0, 1)]
    assert len({recipe.hash for recipe in recipes}) == len(recipes)
    assert Recipe(**make_recipe(2).to_dict()).hash == make_recipe(2).hash


def test_command_says_only_what_the_defaults_do_not():
    assert convert_command("m", "out", make_recipe(2), []) == "gqa convert m out --kv-heads 2"
    recipe = make_recipe(1, "mean", refit=True, calibration_tokens=512, refine_tokens=256, seed=3)
    assert convert_command("a b", "out", recipe, ["x.txt"]) == (
        "gqa convert 'a b' out --kv-heads 1 --method mean --calibrate x.txt --calibration-tokens 512 --window 256 "
        "--measure 0 --refine 256 --refine-steps 120 --refit --seed 3"
    )
