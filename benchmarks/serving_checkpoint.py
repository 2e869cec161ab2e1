"""Write a GGUF file as a bfloat16 Hugging Face checkpoint, for peers that read no GGUF.

    PYTHON benchmarks/serving_checkpoint.py FILE.gguf FOLDER

Runs in the peer's own Python: it needs transformers 5, torch, accelerate and gguf, and nothing of alight.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(source: Path, target: Path) -> None:
    where = {"gguf_file": source.name}
    # float32 first: without `dequantize` the model cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    partial = target.with_suffix(".part")
    model.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(partial)
    partial.rename(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
