"""What an export is: a frozen config that turns a checkpoint into the file of an artifact. And the one for GGUF.

A format registers its export under `alight.exporters`, by the name that recipes call it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from alight import planner
from alight.builder import parse_bytes
from alight.devices import Device
from alight.errors import BadInput
from alight.planner import QUANT_TYPES, Form, Prediction, Shape
from alight.quantization import needs_imatrix, takes_imatrix
from alight.store import normal_name
from alight_converters.build_weights import Weights, imatrix_of
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Progress, silent
from alight_converters.quantize.gguf import Fallbacks, file_type, quantize, tensor_type

Bytes = Annotated[int, BeforeValidator(lambda v: parse_bytes(v) if isinstance(v, str) else v), Field(gt=0)]


@dataclass(frozen=True)
class ExportContext:
    """What an export may use besides its input.

    Attributes:
        folder: where the file goes.
        weights: the checkpoint, and its GGUF, which all exports of a recipe share.
        calibration: makes the token rows, where the export needs them.
        device: where the export computes.
        target: the device that the artifact is for; None: this machine.
        measured: filled by the export, JSON values only; it goes into the report as it is.
        fallbacks: filled by the export: tensors that are of another type than was asked for, since it does not fit.
    """

    folder: Path
    weights: Weights
    calibration: Callable[[], Calibration]
    device: str = "cpu"
    target: Device | None = None
    seed: int = 0
    progress: Progress = silent
    measured: dict[str, Any] = field(default_factory=dict)
    fallbacks: Fallbacks = field(default_factory=dict)


class Export(BaseModel):
    """One artifact of a recipe. A subclass sets `format` to a literal, and has a field `type` for what `--quant` says.

    Attributes:
        name: in the store; None takes the recipe's, with the export's label as the tag where there are several.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    name: Annotated[str, AfterValidator(normal_name)] | None = None

    @classmethod
    def of_type(cls, kind: str | None) -> Export:
        """What `alight build --quant KIND` means in this format; None: what it makes unless told.

        Raises:
            pydantic.ValidationError, BadInput: the format has no such type; says which it has.
        """
        return cls.model_validate({} if kind is None else {"type": kind.lower()})

    @property
    @abstractmethod
    def label(self) -> str:
        """What the report calls it, such as "Q4_K_M+imatrix"."""

    @property
    @abstractmethod
    def calibrated(self) -> bool:
        """Whether the result depends on the calibration text."""

    @abstractmethod
    def run(self, context: ExportContext) -> Path:
        """Write the weight file into `context.folder`.

        Raises:
            AlightError: what is wrong, the value, and what to do next.
        """

    def predict(self, shape: Shape, device: Device, context: int, streams: int) -> Prediction | None:
        """What it would be on a device, from the shape of the checkpoint alone; None: not known before it is made."""
        return None


def _gguf_type(value: str) -> str:
    return "mixed" if value.lower() == "mixed" else file_type(value)


class GGUF(Export):
    """A GGUF file at one quantization type, or with a type for each tensor.

    Attributes:
        type: llama.cpp's file type, such as Q4_K_M; or "mixed": the types that lose least within `max_bytes`.
        imatrix: weigh rounding errors by an importance matrix. "mixed" always does.
        max_bytes: of the file, for "mixed".
        embedding: ggml type of embedding and head, such as Q8_0. After QAT it keeps llama.cpp from choosing another
            than the one that they were trained for.
    """

    format: Literal["gguf"] = "gguf"
    type: Annotated[str, AfterValidator(_gguf_type)] = "Q4_K_M"
    imatrix: bool = False
    max_bytes: Bytes | None = None
    embedding: Annotated[str, AfterValidator(tensor_type)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> GGUF:
        if (self.type == "mixed") != (self.max_bytes is not None):
            raise ValueError("type mixed and max_bytes belong together")
        if self.embedding and self.type == "mixed":
            raise ValueError("type mixed chooses the embedding's type itself")
        if self.imatrix and not takes_imatrix(self.type):
            raise ValueError(f"{self.type} has no use for an importance matrix")
        if not self.calibrated and needs_imatrix(self.type):
            raise ValueError(
                f"{self.type} needs an importance matrix: set imatrix: true, or take a larger type, such as Q3_K_S"
            )
        return self

    @classmethod
    def of_type(cls, kind: str | None) -> GGUF:
        if kind is None:
            return cls()
        form = Form.parse(kind)
        return cls(type=form.type, imatrix=form.imatrix)

    @property
    def label(self) -> str:
        if self.max_bytes is not None:
            return f"mixed-{self.max_bytes / 1e6:.0f}MB"
        return f"{self.type}+imatrix" if self.imatrix else self.type

    @property
    def calibrated(self) -> bool:
        return self.imatrix or self.type == "mixed"

    def run(self, context: ExportContext) -> Path:
        target = context.folder / f"{self.label}.gguf"
        weights = context.weights
        ends = [t.name for t in weights.header.tensors if t.name in ("token_embd.weight", "output.weight")]
        own = dict.fromkeys(ends, self.embedding) if self.embedding else {}
        if not self.calibrated:
            return quantize(weights.gguf, target, self.type, tensor_types=own, fallbacks=context.fallbacks)
        checkpoint, calibration = weights.checkpoint, context.calibration()
        imatrix = imatrix_of(checkpoint, calibration, context.progress, device=context.device)
        if self.max_bytes is None:
            return quantize(
                weights.gguf,
                target,
                self.type,
                imatrix=imatrix,
                tensor_types=own,
                fallbacks=context.fallbacks,
            )
        types = self._types(checkpoint, calibration, imatrix, context)
        made = quantize(weights.gguf, target, "Q4_K_M", imatrix=imatrix, tensor_types=types)
        if made.stat().st_size > self.max_bytes:
            raise BadInput(
                f"{self.label} came out as {made.stat().st_size / 1e6:.1f} MB", hint="Raise max_bytes."
            )
        return made

    def predict(self, shape: Shape, device: Device, context: int, streams: int) -> Prediction | None:
        if self.type not in QUANT_TYPES:
            return None
        shaped = planner.quantized(shape, self.label)
        return planner.predict(shaped, device, quantization=self.label, context=context, streams=streams)

    def _types(
        self, checkpoint: Checkpoint, calibration: Calibration, imatrix: Path, context: ExportContext
    ) -> dict[str, str]:
        from alight_converters.quantize.imatrix import Imatrix
        from alight_converters.quantize.mixed import choose_types

        header = context.weights.header
        around = header.file_bytes - header.weight_bytes  # metadata and the vocabulary
        return choose_types(
            checkpoint,
            calibration,
            Imatrix.load(imatrix),
            (self.max_bytes or 0) - around,
            device=context.device,
            seed=context.seed,
            progress=context.progress,
            measured=context.measured,
        )
