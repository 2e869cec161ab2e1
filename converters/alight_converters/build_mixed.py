"""The mixed-precision candidate of a search: where memory ends between two types, a type for each tensor uses it up.

It is tried once, at the limit, and only where the limit keeps every uniform type that fits above the wanted KL:
otherwise the fastest is chosen, which is smaller.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alight import planner
from alight.builder import BuildRequest, Candidate, Progress
from alight.planner import Prediction
from alight_converters.build_weights import Weights
from alight_converters.build_workspace import cache, key_of, read_json, write_json
from alight_converters.quantize.gguf import quantize
from alight_converters.search import kl_of, memory_error, memory_limit, memory_on, speed_on

if TYPE_CHECKING:  # torch is not needed to quantize a GGUF
    from alight_converters.calibration import Calibration
    from alight_converters.quantize.mixed import Option

_SPARE = 0.01  # of the limit: left free where memory is measured, which gives another figure each time
_TOKENS = 8192  # of calibration that sensitivities are measured on: each row is a backward pass
_LARGEST = "Q8_0"  # of the types that a mix is made of


@dataclass(frozen=True)
class Mix:
    """A form with a type for each tensor.

    Attributes:
        types: ggml types by GGUF name.
        measured: the estimated KL of each tensor at each type, and of the whole.
        seconds: that the estimate took.
    """

    prediction: Prediction
    types: dict[str, str]
    measured: dict[str, Any]
    parameters: int
    seconds: float

    @property
    def name(self) -> str:
        return self.prediction.quantization

    def make(self, source: Weights, imatrix: Path) -> Path:
        """Its GGUF."""
        target = source.folder / f"{self.name}.gguf"
        return quantize(source.gguf, target, "Q4_K_M", imatrix=imatrix, tensor_types=self.types)

    def to_stage(self) -> dict[str, Any]:
        """As the report tells it: a stage that measured something."""
        return {
            "kind": f"sensitivity of the tensors, for {self.name}",
            "settings": {"types": self.types},
            "digest": "",
            "seconds": self.seconds,
            "parameters": self.parameters,
            "bytes": self.prediction.memory.weights,
            "measured": self.measured,
            "cached": False,
        }


def room_for(source: Weights, candidates: Sequence[Candidate], request: BuildRequest) -> tuple[int, str]:
    """Bytes of weights that a mix at the limit may have; 0 where none is worth trying, and why.

    Args:
        candidates: all that were measured.
    """
    limit = memory_limit(request)
    fitting = [c for c in candidates if memory_on(c, request) <= limit]
    if any(kl_of(c) <= request.max_kl and speed_on(c, request) >= request.min_speed for c in fitting):
        return 0, "one type for all tensors keeps the limits"
    largest = planner.quantized(source.shape, _LARGEST)
    rest = replace(
        planner.memory(largest, context=request.context * request.streams), weights=0
    ).total  # the same for all forms
    built = [c for c in candidates if not c.is_source]
    spare = _SPARE if request.device.id == "this" else 0.0
    room = int(limit * (1 - spare) / memory_error(built, request)) - rest
    if room >= largest.weight_bytes:
        return 0, "memory is not the limit that binds"
    return max(room, 0), "no room for weights" if room <= 0 else ""


def mix_of(
    source: Weights,
    calibration: Calibration,
    imatrix: Path,
    room: int,
    request: BuildRequest,
    progress: Progress | None,
) -> Mix:
    """The types that lose least within `room` bytes.

    Raises:
        BadInput: even the smallest mix is larger.
    """
    from alight_converters.quantize.mixed import fixed_bytes, solve, told

    began = time.monotonic()
    options = _options(source, calibration.at_most(_TOKENS), imatrix, request.seed, progress)
    fixed = fixed_bytes(source.checkpoint)
    chosen = solve(options, room - fixed)
    types = {name: option.type for name, option in chosen.items()}
    measured = told(options, chosen, fixed)

    shape = planner.shape_of_gguf([source.header])
    mixed = tuple(replace(t, type=types.get(t.name, t.type)) for t in shape.tensors)
    prediction = planner.predict(
        replace(shape, tensors=mixed),
        request.device,
        quantization=f"mixed-{measured['bytes'] / 1e6:.0f}MB",
        context=request.context,
        streams=request.streams,
    )
    prediction = replace(prediction, kl=measured["estimated_kl"])
    return Mix(prediction, types, measured, shape.parameters, time.monotonic() - began)


def _options(
    source: Weights, calibration: Calibration, imatrix: Path, seed: int, progress: Progress | None
) -> dict[str, list[Option]]:
    """What each tensor would lose at each type; kept, since it takes minutes and is the same for every limit."""
    from alight_converters.passes import silent
    from alight_converters.quantize.imatrix import Imatrix
    from alight_converters.quantize.mixed import Option, options_of

    key = key_of(weights=source.digest, rows=calibration.digest, seed=seed)
    file = cache() / "sensitivity" / f"{key}.json"
    known = read_json(file)
    if known is None:
        found = options_of(
            source.checkpoint, calibration, Imatrix.load(imatrix), seed=seed, progress=progress or silent
        )
        known = {name: [[o.type, o.bytes, o.kl] for o in options] for name, options in found.items()}
        write_json(file, known)
    return {name: [Option(*values) for values in options] for name, options in known.items()}
