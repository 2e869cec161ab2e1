"""The recipes in examples/ are valid, and can be planned on any machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from alight_converters.recipe import Recipe
from alight_converters.recipe_files import read

RECIPES = sorted((Path(__file__).parents[2] / "examples/recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_it_is_valid_and_can_be_planned(file: Path) -> None:
    recipe: Recipe = read(file)
    plan = recipe.plan()
    assert [stage.name.split(". ")[1] for stage in plan.stages] == [p.kind for p in recipe.passes]
    assert len(plan.exports) + len(plan.unpredicted) == len(recipe.export)
