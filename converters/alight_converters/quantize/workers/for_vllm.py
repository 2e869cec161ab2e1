"""Quantize a checkpoint with llmcompressor; runs in an environment of its own."""
# Its imports are not in our environment:
# mypy: ignore-errors

import json
import sys

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    request = json.load(sys.stdin)
    rows = np.load(request["rows"])
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype="auto", local_files_only=True)
    model.to(request["device"])
    ids = rows.tolist()
    oneshot(
        model=model,
        recipe=recipe(request["scheme"], request["block"]),
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": np.ones_like(rows).tolist()}),
        num_calibration_samples=len(ids),
        max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
        log_dir=None,
    )
    model.save_pretrained(request["target"], save_compressed=True)
    AutoTokenizer.from_pretrained(request["source"], local_files_only=True).save_pretrained(request["target"])


def recipe(scheme: str, block: int) -> list:
    """Weights of all linear layers but the head; with W8A8 also activations, per token as they come."""
    if scheme == "W8A8":
        return [QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": block}
    how = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if scheme == "GPTQ":
        return [GPTQModifier(**how)]
    if not torch.cuda.is_available():  # it pins memory for a GPU that is not there
        from llmcompressor.pipelines.cache import IntermediatesCache

        IntermediatesCache.pin_memory = lambda *_args, **_kwargs: None
    return [AWQModifier(), QuantizationModifier(**how)]


main()
