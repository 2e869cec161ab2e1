"""A checkpoint in pieces of 15 MB, for a machine from which only small files come back.

Weights on a GGUF grid travel as GGUF blocks, which lose nothing; all others as bfloat16, or as Q8_0.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.torch import load, save
from torch import Tensor

from alight_converters.checkpoint import Checkpoint, write

PIECE = 15 << 20  # bytes
PIECES = 4  # per call


def pack(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """Write pieces `args.first` and the next ones to `args.out`."""
    tensors, forms = {}, {}
    for name, tensor in checkpoint.tensors():
        forms[name], tensors[name] = _smallest(tensor.float(), args.lossy)
    whole = save(tensors, metadata={"forms": json.dumps(forms), "config": json.dumps(checkpoint.config)})
    pieces = [whole[i : i + PIECE] for i in range(0, len(whole), PIECE)]
    args.out.mkdir(parents=True, exist_ok=True)
    for i, piece in list(enumerate(pieces))[args.first : args.first + PIECES]:
        (args.out / f"{args.name}.{i:03}").write_bytes(piece)
    return {"pieces": len(pieces), "bytes": len(whole), "forms": sorted(set(forms.values()))}


def unpack(args: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint again, in float32, with the tokenizer of the state folder's source."""
    whole = b"".join(piece.read_bytes() for piece in sorted(args.pieces))
    size = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + size])["__metadata__"]
    forms, config = (json.loads(metadata[key]) for key in ("forms", "config"))
    tensors = ((name, _float(tensor, forms[name])) for name, tensor in load(whole).items())
    like = Checkpoint.open(args.state / "source")
    made = write(args.state / args.name, config | {"dtype": "float32"}, tensors, like=like)
    return {"parameters": made.parameters}


def _smallest(tensor: Tensor, lossy: bool) -> tuple[str, Tensor]:
    weight = tensor.numpy()
    if tensor.dim() == 2 and weight.shape[1] % 32 == 0:
        for kind in (Type.Q4_0, Type.Q8_0):
            blocks = quantize(weight, kind)
            if np.array_equal(dequantize(blocks, kind), weight) or (lossy and kind is Type.Q8_0):
                return kind.name, torch.from_numpy(blocks)
    return ("F32", tensor) if tensor.dim() < 2 else ("BF16", tensor.bfloat16())


def _float(tensor: Tensor, form: str) -> Tensor:
    if form in ("F32", "BF16"):
        return tensor.float()
    return torch.from_numpy(dequantize(tensor.numpy(), Type[form]))
