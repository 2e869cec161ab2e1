"""A recipe: the passes a checkpoint goes through, and the artifacts that come out. Typed, and complete by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    SerializeAsAny,
    ValidationError,
)

from alight import plugins
from alight.builder import MAX_KL
from alight.errors import AlightError, BadInput, nearest
from alight.planner import DEFAULT_CONTEXT
from alight.store import normal_name
from alight_converters.documents import HUB
from alight_converters.passes import Pass
from alight_converters.recipe_export import Export

if TYPE_CHECKING:
    from alight.builder import BuildResult, Progress, RecipePlan

M = TypeVar("M", bound=BaseModel)
Where = tuple[str | int, ...]  # a place in a recipe: ("passes", 1, "ratio")


def _torch_device(value: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise ValueError(f"must be cpu, cuda or cuda:N, got {value!r}")
    return value


def _text(value: Any) -> Path | str | None:
    """A path, or the address of a data set."""
    if not isinstance(value, (str, Path, type(None))):
        raise ValueError(f"must be a path, or {HUB}organisation/name, got {value!r}")
    return Path(value) if isinstance(value, str) and not value.startswith(HUB) else value


class CalibrationText(BaseModel):
    """What passes look at activations on and train on.

    Attributes:
        text: a file or folder of .txt, .md, .jsonl, .json, .csv, .parquet or .arrow; a data set of the Hugging Face
            hub, `hf://datasets/organisation/name[@revision][:file]`; None: text that the source model writes itself.
        rows, length: how many rows of how many tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[Path | str | None, BeforeValidator(_text)] = None
    rows: int = Field(default=64, ge=1)
    length: int = Field(default=256, ge=8)


class Evaluation(BaseModel):
    """What quality is measured on.

    Attributes:
        text: a plain text file; None: text that the source model writes itself.
        tokens: how many at most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Path | None = None
    tokens: int = Field(default=2048, ge=32)


class Recipe(BaseModel):
    """How to get from a source to artifacts.

    Attributes:
        source: a checkpoint folder, a GGUF, a LoRA adapter folder, a model of the store, or any source.
        name: of the artifacts in the store.
        target: the device they are for ("for" in YAML).
        context, streams: what it must hold.
        max_kl: nats, mean; what `chosen` means where there are several exports.
        device: where passes compute: "cpu", "cuda" or "cuda:N".
        seed: of everything that is drawn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    source: str
    name: Annotated[str, AfterValidator(normal_name)]
    passes: tuple[SerializeAsAny[InstanceOf[Pass]], ...] = ()
    export: Annotated[tuple[SerializeAsAny[InstanceOf[Export]], ...], Field(min_length=1)]
    calibration: CalibrationText = CalibrationText()
    evaluate: Evaluation = Evaluation()
    target: str = Field(default="this", alias="for")
    context: int = Field(default=DEFAULT_CONTEXT, ge=8)
    streams: int = Field(default=1, ge=1, le=128)
    max_kl: float = Field(default=MAX_KL, gt=0)
    device: Annotated[str, AfterValidator(_torch_device)] = "cpu"
    seed: int = Field(default=0, ge=0)

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, folder: Path | None = None) -> Recipe:
        """A recipe from plain values, as YAML gives them.

        Args:
            folder: what relative paths are relative to; None: the current folder.

        Raises:
            RecipeError: with the place and what is wrong there, for every mistake.
        """
        mistakes: list[Mistake] = []
        made = dict(data)
        for key, group, tag in (("passes", plugins.PASSES, "kind"), ("export", plugins.EXPORTERS, "format")):
            if isinstance(data.get(key), list):
                made[key] = [_item(x, (key, i), group, tag, mistakes) for i, x in enumerate(data[key])]
        try:
            return cls.model_validate(made)._below(folder or Path())
        except ValidationError as error:
            told = {m.where[:2] for m in mistakes}  # what stands for a wrong pass is wrong again here
            mistakes += [m for m in mistakes_of(error, (), cls) if m.where[:2] not in told]
        raise RecipeError(mistakes)

    def plan(self) -> RecipePlan:
        """What `run` would do, with times and memory."""
        from alight_converters.recipe_plan import plan

        return plan(self)

    def run(self, *, folder: Path | None = None, progress: Progress | None = None) -> BuildResult:
        """Do it. Stages that ran before with the same input and settings are not repeated.

        Args:
            folder: where to write the artifacts as plain folders, too; one below it for each where there are several.

        Raises:
            AlightError: what is wrong, the value, and what to do next; finished stages are kept.
        """
        from alight_converters.recipe_run import run

        return run(self, folder=folder, progress=progress)

    def _below(self, folder: Path) -> Recipe:
        """Relative paths made absolute."""
        source = folder / Path(self.source).expanduser()
        return self.model_copy(
            update={
                "source": str(source.resolve()) if source.exists() else self.source,
                "passes": tuple(_absolute(p, folder) for p in self.passes),
                "calibration": _absolute(self.calibration, folder),
                "evaluate": _absolute(self.evaluate, folder),
            }
        )


class Mistake:
    """One thing wrong with a recipe: where, and what."""

    def __init__(self, where: Where, what: str) -> None:
        self.where = where
        self.what = what

    @property
    def path(self) -> str:
        """As people write it: "passes[1].ratio"."""
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.where)
        return text.lstrip(".") or "the recipe"


class RecipeError(BadInput):
    """A recipe that cannot be used. `mistakes` tells each place."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__("\n".join(f"{m.path}: {m.what}" for m in mistakes))
        self.mistakes = mistakes


def _item(value: Any, where: Where, group: str, tag: str, mistakes: list[Mistake]) -> Any:
    """A pass or an export from plain values; adds to `mistakes` what is wrong with it."""
    if not isinstance(value, Mapping):
        mistakes.append(Mistake(where, f"must be a mapping with a {tag!r}, got {value!r}"))
        return None
    known = plugins.names(group)
    name = value.get(tag)
    if not isinstance(name, str) or name not in known:
        got = f"unknown {tag} {name!r}" if tag in value else f"has no {tag!r}"
        near = nearest(str(name), known)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        mistakes.append(Mistake((*where, tag), f"{got}; {hint}known: {', '.join(known)}"))
        return None
    try:
        kind = plugins.find(group, name, tag)
    except AlightError as error:
        mistakes.append(Mistake((*where, tag), str(error)))
        return None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        mistakes += mistakes_of(error, where, kind)
        return None


def mistakes_of(error: ValidationError, where: Where, model: type[BaseModel]) -> list[Mistake]:
    """pydantic's errors in our words."""
    return [_mistake(dict(e), where, model) for e in error.errors()]


_COMPARED = {
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
}


def _mistake(error: dict[str, Any], where: Where, model: type[BaseModel]) -> Mistake:
    kind, context = error["type"], error.get("ctx") or {}
    place, inside = _place(error["loc"], model)
    if kind.startswith("union_tag"):
        place = (*place, context["discriminator"].strip("'"))
    here = (*where, *place)
    got = "" if isinstance(error["input"], BaseModel) else f", got {error['input']!r}"
    if kind == "missing":
        return Mistake(here, "is missing")
    if kind == "extra_forbidden":
        return Mistake(here, f"unknown key; {_keys(inside, str(place[-1]))}")
    if kind in _COMPARED:
        sign, key = _COMPARED[kind]
        return Mistake(here, f"must be {sign} {context[key]:g}{got}")
    if kind in ("literal_error", "enum"):
        return Mistake(here, f"must be one of {context['expected']}{got}")
    if kind == "union_tag_invalid":
        return Mistake(here, f"must be one of {context['expected_tags']}, got {context['tag']!r}")
    if kind == "too_short":
        return Mistake(here, "must have one entry at least")
    if kind == "value_error":
        cause = context.get("error")
        words = ". ".join(str(cause or error["msg"].removeprefix("Value error, ")).splitlines())
        return Mistake(here, words if repr(error["input"]) in words else f"{words}{got}")
    if kind in ("model_type", "model_attributes_type", "dict_type") and inside:
        return Mistake(here, f"must be a mapping; {_keys(inside)}{got}")
    return Mistake(here, f"{error['msg'][0].lower()}{error['msg'][1:]}{got}")


def _keys(model: type[BaseModel] | None, wrong: str = "") -> str:
    """The keys of a part of a recipe, for those who wrote another."""
    known = sorted(f.alias or name for name, f in model.model_fields.items()) if model else []
    near = nearest(wrong, known) if wrong else []
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}known: {', '.join(known)}"


def _place(loc: tuple[str | int, ...], model: type[BaseModel]) -> tuple[Where, type[BaseModel] | None]:
    """Where pydantic's error is, as the user wrote it, and the model whose key it is about.

    pydantic puts the tag of a union ("logit") between the key and what is inside it; nobody wrote it there.
    """
    place: list[str | int] = []
    at: type[BaseModel] | None = model
    choices: list[type[BaseModel]] = []
    for step in loc:
        chosen = next((c for c in choices if step in _tags(c)), None)
        if chosen:
            at, choices = chosen, []
            continue
        place.append(step)
        if isinstance(step, int):
            continue
        known = {f.alias or name: f for name, f in (at.model_fields if at else {}).items()}
        if step not in known:
            break  # the unknown key itself
        choices = _models(known[step].annotation)
        at = choices[0] if len(choices) == 1 else None
    return tuple(place), at


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation allows: one of `LoRA | None`, four of distillation's methods."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind else ()


def _absolute(model: M, folder: Path) -> M:
    changed = {
        name: (folder / value.expanduser()).resolve()
        for name in type(model).model_fields
        if isinstance(value := getattr(model, name), Path)
    }
    return model.model_copy(update=changed) if changed else model
