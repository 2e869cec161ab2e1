"""Recipe files: YAML whose mistakes are told with their line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alight.builder import BuildResult, Progress, RecipePlan, RecipeRunner
from alight.devices import Device
from alight.errors import BadInput, MissingExtra
from alight.store import normal_name
from alight_converters.recipe import Mistake, Recipe, RecipeError, Where


class RecipeFiles(RecipeRunner):
    """What `alight build RECIPE.yaml` runs."""

    def plan(self, file: Path, *, device: Device | None = None, name: str | None = None) -> RecipePlan:
        from alight_converters.recipe_plan import plan

        return plan(_named(read(file), name), target=device)

    def build(
        self,
        file: Path,
        *,
        device: Device | None = None,
        name: str | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> BuildResult:
        from alight_converters.recipe_run import run

        return run(_named(read(file), name), target=device, folder=folder, progress=progress)


def _named(recipe: Recipe, name: str | None) -> Recipe:
    return recipe.model_copy(update={"name": normal_name(name)}) if name else recipe


def read(file: Path) -> Recipe:
    """The recipe in a YAML file; relative paths in it are relative to its folder.

    Raises:
        BadInput: no such file, or mistakes, each told with its line: "r.yaml line 7: passes[1].ratio: must be < 1,
        got 1.4".
    """
    try:
        import yaml
    except ImportError:
        raise MissingExtra("reading a recipe", "convert") from None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the recipe {file}: {error}") from error
    lines: dict[Where, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        mistakes = _walk(node, (), lines)
        data: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise BadInput(f"{file.name}{line}: not YAML: {problem}") from error
    if not isinstance(data, dict):
        raise BadInput(f"{file.name}: a recipe is a mapping of keys", hint="docs/recipes.md shows one.")
    if mistakes:
        raise _error(file, mistakes, lines)
    try:
        return Recipe.parse(data, folder=file.parent)
    except RecipeError as error:
        raise _error(file, error.mistakes, lines) from error


def _walk(node: Any, where: Where, lines: dict[Where, int]) -> list[Mistake]:
    """Note the line of each key; keys that are there twice are mistakes (YAML takes the last in silence)."""
    import yaml

    mistakes = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*where, str(key.value))
            if place in lines:
                mistakes.append(Mistake(place, f"is there twice, first in line {lines[place]}"))
            lines[place] = key.start_mark.line + 1
            mistakes += _walk(value, place, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*where, i)] = value.start_mark.line + 1
            mistakes += _walk(value, (*where, i), lines)
    return mistakes


def _error(file: Path, mistakes: list[Mistake], lines: dict[Where, int]) -> BadInput:
    def line(where: Where) -> int:
        """Of the key, or of what it is missing in."""
        while where and where not in lines:
            where = where[:-1]
        return lines.get(where, 1)

    told = [f"{file.name} line {line(m.where)}: {m.path}: {m.what}" for m in mistakes]
    return BadInput("\n".join(told), hint="docs/recipes.md lists all keys.")
