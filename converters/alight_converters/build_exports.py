"""Build exactly the artifacts that were asked for, of one or several formats: exports of the source as it is."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import ValidationError

from alight import plugins
from alight.blobs import disk_full_is_ours
from alight.builder import Builder, BuildRequest, BuildResult, Progress
from alight.errors import BadInput
from alight.planner import Prediction
from alight_converters.build_weights import Weights, calibration_key, calibration_of, check_calibration, told
from alight_converters.build_workspace import key_of, workspace
from alight_converters.calibration import Calibration
from alight_converters.exports import Exports, Input, names_of, predict
from alight_converters.passes import silent
from alight_converters.recipe import mistakes_of
from alight_converters.recipe_export import Export


class ExportsBuilder(Builder):
    """Artifacts of any format that has an exporter."""

    def plan(self, request: BuildRequest) -> list[Prediction]:
        exports = exports_of(request)
        with workspace(0) as folder:
            shape = Weights(request.source, folder).shape
            return [predict(export, shape, request) for export in exports]

    def build(self, request: BuildRequest, progress: Progress | None = None) -> BuildResult:
        exports = exports_of(request)
        names = names_of(request.name, exports)
        if request.folder is not None and request.folder.exists():
            raise BadInput(f"{request.folder} exists already", hint="Give a new folder.")
        with workspace(request.source.size) as work, disk_full_is_ours(work):
            weights = Weights(request.source, work)
            text, seed = request.calibration, request.seed

            settings: dict[str, Any] = {
                "exports": [export.model_dump(mode="json", exclude={"name"}) for export in exports],
                "tokens": request.tokens,
                "seed": seed,
                "calibration": None,
            }

            @cache
            def calibration() -> Calibration:
                made = calibration_of(weights.checkpoint, text, seed, progress)
                settings["calibration"] = told(made)
                return made

            made_from = Input(
                weights,
                weights.digest,
                calibration,
                calibration_key=lambda: key_of(calibration=calibration_key(text, seed)),
                seed=seed,
            )
            run = Exports(request, weights, made_from, work, progress or silent)
            return run.build(exports, names, settings=settings, folder=request.folder)


def exports_of(request: BuildRequest) -> list[Export]:
    """What the formats and types of a request mean: of each format the types that it has, or its usual one.

    Raises:
        BadInput: a type that none of the formats has, with those that they have; a calibration text that nothing uses,
        or that is not there.
    """
    check_calibration(request.calibration)
    found: list[Export] = []
    refused: dict[str, list[str]] = {kind: [] for kind in request.types or ()}
    for name in request.formats:
        format = plugins.find(plugins.EXPORTERS, name, "format")
        mine = []
        for kind, why in refused.items():
            answer = _of(format, kind)
            if isinstance(answer, Export):
                mine.append(answer)
            else:
                why.append(f"{name}: {answer}")
        found += mine or [format.of_type(None)]
    for kind, why in refused.items():
        if len(why) == len(request.formats):
            raise BadInput(f"no {' and no '.join(request.formats)} type is {kind!r}", hint="\n".join(why))
    if request.calibration is not None and not any(export.calibrated for export in found):
        raise BadInput(
            f"a calibration text is given, but {', '.join(e.label for e in found)} needs none",
            hint="Leave --calibration out, or ask for a type that uses it, such as q4_k_m+imatrix.",
        )
    return found


def _of(format: type[Export], kind: str) -> Export | str:
    """An export of a format at a type; or why there is none."""
    try:
        return format.of_type(kind)
    except ValidationError as error:
        return "; ".join(m.what for m in mistakes_of(error, (), format))
    except BadInput as error:
        return f"{error.message}. {error.hint}"
