"""Write an encoder (BERT and its kin: embeddings, rerankers, classifiers) as an ONNX folder.

There is no cache and no loop in an encoder: PyTorch's own exporter writes it as it is.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from alight.errors import BadInput, InvalidModelFile, MissingExtra, Unsupported
from alight_converters.checkpoint import CONFIG
from alight_converters.export.onnx import DATA, GRAPH
from alight_converters.export.whole_folder import whole_folder
from alight_converters.tokenizer_files import read_json, read_tokenizer

_OPSET = 20  # the first with GELU, and read by every ONNX Runtime of the last years
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".data", ".index.json")


def export_encoder(checkpoint: Path, folder: Path) -> Path:
    """Write the encoder in a Hugging Face folder to `folder`: graph, weights, config, tokenizer, what else is there.

    The graph takes `input_ids`, `attention_mask`, and `token_type_ids` where the model has them, each int64 of
    shape (texts, tokens). It gives `last_hidden_state`, float32 of shape (texts, tokens, hidden), for embeddings;
    or `logits`, (texts, classes), where the checkpoint has a head that classifies, as rerankers have.

    Raises:
        BadInput: `folder` exists, or `checkpoint` is no checkpoint. InvalidModelFile: its weights are damaged or not
        those of its config. Unsupported: it is no encoder. DiskFull: no room. MissingExtra: `convert-onnx`.
    """
    if not (checkpoint / CONFIG).is_file():
        raise BadInput(f"{checkpoint} is not a checkpoint: it has no {CONFIG}")
    config = read_json(checkpoint / CONFIG)
    read_tokenizer(checkpoint)
    model, output = _load(checkpoint, config)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 0]])
    inputs = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
    if int(config.get("type_vocab_size") or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(tokens)
    with whole_folder(folder) as part:
        _write(_Output(model, output, tuple(inputs)), inputs, output, part / GRAPH)
        for file in checkpoint.iterdir():
            if file.is_file() and file.suffix not in _WEIGHTS and not file.name.endswith(".index.json"):
                shutil.copyfile(file, part / file.name)
        told = {"onnx_precision": "fp32", "num_parameters": sum(p.numel() for p in model.parameters())}
        (part / CONFIG).write_text(json.dumps(config | told, indent=2) + "\n", encoding="utf-8")
    return folder


class _Output(torch.nn.Module):
    """A model of which one output is taken, with inputs in a fixed order."""

    def __init__(self, model: torch.nn.Module, output: str, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.output, self.inputs = model, output, inputs

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(**dict(zip(self.inputs, values, strict=True)))[self.output]
        return found


def _load(checkpoint: Path, config: dict[str, Any]) -> tuple[torch.nn.Module, str]:
    """The model in float32, and which of its outputs is wanted. No code from the folder is run."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    names = config.get("architectures") or []
    if config.get("is_decoder") or any(name.endswith("ForCausalLM") for name in names):
        raise Unsupported(f"{checkpoint.name} is a decoder", hint="alight build --format onnx exports it.")
    classifies = any(name.endswith("ForSequenceClassification") for name in names)
    kind: Any = AutoModelForSequenceClassification if classifies else AutoModel
    try:
        model, report = kind.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # each model class has checks, and exceptions, of its own
        raise InvalidModelFile(f"{checkpoint} cannot be loaded: {error}") from error
    missing = sorted(
        n for n in report["missing_keys"] if not n.startswith("pooler.")
    )  # not used for embeddings
    if missing:
        raise InvalidModelFile(f"{checkpoint.name} lacks {missing[0]}, and {len(missing) - 1} more")
    return model.eval(), "logits" if classifies else "last_hidden_state"


def _write(model: torch.nn.Module, inputs: dict[str, torch.Tensor], output: str, target: Path) -> None:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    texts, length = torch.export.Dim("texts"), torch.export.Dim("tokens")
    try:
        program = torch.onnx.export(
            model,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=(tuple({0: texts, 1: length} for _ in inputs),),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    except ImportError as error:
        raise MissingExtra(f"writing ONNX ({error.name})", "convert-onnx") from error
    except Exception as error:  # whatever in the model cannot be traced
        why = str(error).strip().splitlines()[0]
        raise Unsupported(f"PyTorch cannot export {type(model).__name__}: {why}") from error
    if program is None:
        raise Unsupported("PyTorch wrote no program")
    import onnx_ir

    onnx_ir.save(program.model, target, external_data=DATA)
