"""Compile MLC libraries with tvm: `compile_library` is all there is to call."""

from __future__ import annotations

from alight_converters.compile_mlc.library import LIST, compile_library
from alight_converters.compile_mlc.machines import MACHINES

__all__ = ["LIST", "MACHINES", "compile_library"]
