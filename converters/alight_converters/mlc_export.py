"""The export for MLC: weights by our own writer, and libraries compiled for the devices that are to run them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from alight.errors import MissingExtra
from alight_converters.export import mlc
from alight_converters.export.mlc_modes import mode
from alight_converters.export.whole_folder import whole_folder
from alight_converters.recipe_export import Export, ExportContext

THIS_MACHINE = "native"


class MLC(Export):
    """A folder for mlc_llm, web-llm and alight's own MLC target.

    Attributes:
        type: q0f16, q0f32, q4f16_1 or q4f32_1, as mlc_llm names them: bits of a weight, and the float type in which the
            model computes.
        libraries: what to compile the model for, by names of `alight_converters.compile_mlc.MACHINES`; "native" is this
            machine. Empty: the weights alone, for whoever has a library or mlc_llm's own compiler.
        context: tokens of a conversation at most; None: as many as MLC computes exactly.
    """

    format: Literal["mlc"] = "mlc"
    type: Annotated[str, AfterValidator(lambda value: mode(value).name)] = "q4f16_1"
    libraries: tuple[str, ...] = (THIS_MACHINE,)
    context: Annotated[int, Field(gt=0)] | None = None

    @property
    def label(self) -> str:
        return self.type

    @property
    def calibrated(self) -> bool:
        return False

    def run(self, context: ExportContext) -> Path:
        if self.libraries and find_spec("tvm") is None:  # before hours of work, and not after
            raise MissingExtra("compiling for MLC", "convert-mlc")
        folder = context.folder / self.label
        with whole_folder(folder) as part:
            config = mlc.write(
                context.weights.checkpoint, part, self.type, context=self.context, progress=context.progress
            )
            for number, target in enumerate(self.libraries):
                from alight_converters.compile_mlc import compile_library

                context.progress("compiling MLC libraries", number, len(self.libraries))
                compile_library(config, self.type, target, part, context=config["context_window_size"])
        return folder
