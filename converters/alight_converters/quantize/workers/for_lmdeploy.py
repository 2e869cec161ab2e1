"""Quantize a checkpoint with `lmdeploy lite`; runs in an environment of its own."""
# Its imports are not in our environment:
# mypy: ignore-errors

import json
import os
import sys
from pathlib import Path

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # torch-npu without CANN would break `import torch`

import numpy as np
import torch
from lmdeploy.lite.apis import calibrate


def main() -> None:
    request = json.load(sys.stdin)
    rows = torch.from_numpy(np.load(request["rows"]))
    # Its own calibration sets are downloaded from a hub; ours is the text that the user chose.
    calibrate.get_calib_loaders = lambda *_args, **_kwargs: [row[None] for row in rows]
    if not torch.cuda.is_available():  # it reports memory of the GPU, on any device
        torch.cuda.max_memory_allocated = lambda *_args, **_kwargs: 0
    how = {
        "model": request["source"],
        "work_dir": request["target"],
        "calib_samples": len(rows),
        "calib_seqlen": rows.shape[1],
        "device": request["device"],
        "dtype": "float16",
    }
    if request["scheme"] == "AWQ":
        from lmdeploy.lite.apis.auto_awq import auto_awq

        auto_awq(w_group_size=request["block"], **how)
    else:
        from lmdeploy.lite.apis.smooth_quant import smooth_quant

        smooth_quant(**how)
    for statistics in Path(request["target"]).glob("*.pth"):  # of the calibration: no part of the checkpoint
        statistics.unlink()


main()
