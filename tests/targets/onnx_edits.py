"""Changes to exported ONNX folders, for what a test needs and the exporter does not write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

HIDDEN = 64  # of the tiny model


def with_config(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a folder with another genai_config.json."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    file = target / "genai_config.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    return target


def without_shared_buffer(source: Path, target: Path) -> Path:
    """A copy whose keys and values must grow with every run."""
    return with_config(source, target, lambda data: data["search"].update(past_present_share_buffer=False))


def with_hidden_states(source: Path, target: Path) -> Path:
    """A copy whose graph also gives what goes into the output matrix."""
    outputs = {"hidden_states": "hidden_states"}
    with_config(source, target, lambda data: data["model"]["decoder"]["outputs"].update(outputs))
    model = onnx.load(target / "model.onnx", load_external_data=False)
    head = next(n for n in model.graph.node if n.op_type == "MatMul" and "lm_head" in n.name)
    model.graph.node.append(helper.make_node("Identity", [head.input[0]], ["hidden_states"]))
    shape = ["batch_size", "sequence_length", HIDDEN]
    model.graph.output.append(helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, shape))
    (target / "model.onnx").write_bytes(model.SerializeToString())
    return target


def with_adapter(source: Path, target: Path) -> tuple[Path, Path]:
    """A copy whose final matrix an adapter may replace, and such an adapter."""
    import onnxruntime

    shutil.copytree(source, target)
    model = onnx.load(target / "model.onnx")
    head = next(n for n in model.graph.node if n.op_type == "MatMul" and "lm_head" in n.name)
    weight = next(i for i in model.graph.initializer if i.name == head.input[1])
    model.graph.input.append(helper.make_tensor_value_info(weight.name, TensorProto.FLOAT, list(weight.dims)))
    (target / "model.onnx.data").unlink()
    onnx.save(model, target / "model.onnx")
    other = np.ascontiguousarray(numpy_helper.to_array(weight)[:, ::-1])
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({weight.name: onnxruntime.OrtValue.ortvalue_from_numpy(other)})
    file = target.parent / "style.onnx_adapter"
    adapter.export_adapter(str(file))
    return target, file


def encoder(folder: Path, *, ranks: bool) -> torch.nn.Module:
    """Write a tiny random BERT as optimum would, and return it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "small", "boat", "sea", "map", "and", "a"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=len(words), max_position_embeddings=16, num_labels=1, pad_token_id=0, **sizes
    )
    model = (BertForSequenceClassification if ranks else BertModel)(config).eval()
    model.set_attn_implementation("eager")  # tracing the default one leaves the mask out
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json_string())
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            found = self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            return found.logits if ranks else found.last_hidden_state

    example = tuple(torch.ones((2, 5), dtype=torch.int64) for _ in range(3))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    output = "logits" if ranks else "last_hidden_state"
    axes = {name: {0: "batch", 1: "length"} for name in (*names, *([] if ranks else [output]))}
    torch.onnx.export(
        Plain().eval(), example, str(folder / "model.onnx"), input_names=names, output_names=[output],
        dynamic_axes=axes | ({output: {0: "batch"}} if ranks else {}), dynamo=False,
    )  # fmt: skip
    return model
