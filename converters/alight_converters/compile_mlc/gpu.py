"""How a module is scheduled for a GPU: by tvm's rules, but for tensor cores."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.backend import gpu_generic
from tvm.s_tir import dlight
from tvm.target import Target

# tvm 0.27 dies in native code when it schedules these matrices for CUDA's tensor cores or Metal's matrices. The rule
# for plain threads is the one that it takes for a kind of target without either.
_WITHOUT_MATRIX_UNITS = Target({"kind": "opencl"})


class _PlainMatmul(dlight.gpu.Matmul):  # type: ignore[misc]
    def apply(self, func: Any, target: Target, _: bool) -> Any:
        return super().apply(func, _WITHOUT_MATRIX_UNITS, _)


def pipeline(target: Target) -> Any:
    """The passes from the decoder's module to bytecode and kernels, for `relax.build`."""

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def run(module: Any, _: Any) -> Any:
        with target:
            return tvm.transform.Sequential(
                [
                    *gpu_generic.library_dispatch_passes(target),
                    relax.transform.LegalizeOps(),
                    relax.transform.AnnotateTIROpPattern(),
                    relax.transform.FoldConstant(),
                    relax.transform.FuseOps(),
                    relax.transform.FuseTIR(),
                    dlight.ApplyDefaultSchedule(
                        _PlainMatmul(),
                        dlight.gpu.GEMV(),
                        dlight.gpu.Reduction(),
                        dlight.gpu.GeneralReduction(),
                        dlight.gpu.Fallback(),
                    ),
                    *gpu_generic.dataflow_lower_passes(target),
                    *gpu_generic.finalize_passes(target),
                ]
            )(module)

    return run
