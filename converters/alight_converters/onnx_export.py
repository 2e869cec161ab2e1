"""The export for ONNX: a folder for onnxruntime-genai and whatever else runs on ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from alight.errors import BadInput
from alight_converters.build_weights import imatrix_of
from alight_converters.export import onnx
from alight_converters.recipe_export import Export, ExportContext

_KIND = re.compile(
    r"(?P<type>fp32|fp16|int8|int4)(?:-b(?P<block>\d+))?(?P<asym>-asym)?(?P<imatrix>\+imatrix)?"
)


class ONNX(Export):
    """A decoder that ONNX Runtime runs, at one precision.

    Attributes:
        type: fp32 and fp16 (which is for GPUs), or int8 and int4, where a block of weights shares a scale.
        block: of int8 and int4: 32, 64 or 128 columns.
        symmetric: of int8 and int4: no zero points. Weights that QAT left on the grid "onnx_int4" stay as they are in
            symmetric blocks of 32 without an importance matrix, and in no others.
        imatrix: of int4: weigh rounding errors by an importance matrix.
    """

    format: Literal["onnx"] = "onnx"
    type: Literal["fp32", "fp16", "int8", "int4"] = "int4"
    block: Literal[32, 64, 128] = 32
    symmetric: bool = True
    imatrix: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> ONNX:
        if self.imatrix and self.type != "int4":
            raise ValueError(f"{self.type} has no use for an importance matrix")
        return self

    @classmethod
    def of_type(cls, kind: str | None) -> ONNX:
        if kind is None:
            return cls()
        found = _KIND.fullmatch(kind.lower())
        if found is None:
            raise BadInput(
                f"unknown ONNX type {kind!r}",
                hint="Known: fp32, fp16, int8, int4; such as int4-b32-asym+imatrix.",
            )
        return cls.model_validate(
            {
                "type": found["type"],
                "block": int(found["block"] or 32),
                "symmetric": not found["asym"],
                "imatrix": bool(found["imatrix"]),
            }
        )

    @property
    def label(self) -> str:
        return self._precision.label + ("+imatrix" if self.imatrix else "")

    @property
    def calibrated(self) -> bool:
        return self.imatrix

    def run(self, context: ExportContext) -> Path:
        from alight_converters.quantize.imatrix import Imatrix

        checkpoint, importance = context.weights.checkpoint, None
        if self.imatrix:
            made = imatrix_of(checkpoint, context.calibration(), context.progress, device=context.device)
            importance = Imatrix.load(made)
        folder = context.folder / self.label
        kept = onnx.export(checkpoint, folder, self._precision, imatrix=importance, progress=context.progress)
        if kept:
            context.measured["kept_in_float"] = kept
        return folder

    @property
    def _precision(self) -> onnx.Precision:
        return onnx.Precision(self.type, self.block, self.symmetric)
