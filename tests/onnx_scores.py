"""What ONNX Runtime makes of tokens, with an exported graph and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def session(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def log_probabilities(folder: Path, tokens: list[int], steps: int = 0) -> np.ndarray:
    """The log-softmax after each token; the last `steps` tokens are given one by one, through the KV cache."""
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    run = session(folder / decoder["filename"])
    inputs = {i.name: i for i in run.get_inputs()}
    names = [o.name for o in run.get_outputs()]
    past = {
        name: np.zeros((1, i.shape[1], 0, decoder["head_size"]), _FLOATS[i.type])
        for name, i in inputs.items()
        if name.startswith("past_key_values")
    }
    first = len(tokens) - steps
    logits, seen = [], 0
    for part in (tokens[:first], *([t] for t in tokens[first:])):
        seen += len(part)
        feed = {"input_ids": np.array([part], np.int64), "attention_mask": np.ones((1, seen), np.int64)}
        if "position_ids" in inputs:
            feed["position_ids"] = np.arange(seen - len(part), seen, dtype=np.int64)[None]
        found = dict(zip(names, run.run(names, feed | past), strict=True))
        logits.append(found["logits"][0].astype(np.float64))
        past = {n: found[n.replace("past_key_values", "present")] for n in past}
    whole = np.concatenate(logits)
    whole -= whole.max(-1, keepdims=True)
    return whole - np.log(np.exp(whole).sum(-1, keepdims=True))


def genai_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """The logits after the last token, from onnxruntime-genai: it reads `genai_config.json` and feeds the graph."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(tokens) + 2)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(np.array([tokens], np.int32))
    found: np.ndarray = generator.get_output("logits")[0, -1].astype(np.float64)
    return found


def genai_greedy(folder: Path, text: str, count: int) -> str:
    """What onnxruntime-genai continues a text with, tokenizer and all."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    tokens = list(tokenizer.encode(text))
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(tokens) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(np.array([tokens], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return str(tokenizer.decode(generator.get_sequence(0)[len(tokens) :]))
