"""Read a GGUF as a checkpoint: dequantized to float32, under Hugging Face's names, with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor, dequantize

from alight.errors import BadInput, InvalidModelFile, Unsupported
from alight.gguf import GGUFHeader, parts_of, read_header
from alight_converters.checkpoint import Checkpoint, write
from alight_converters.export.gguf import from_gguf, gguf_name
from alight_converters.export.gguf_metadata import (
    SLIDING_LAYERS,
    SLIDING_WINDOW,
    USUAL,
    llama3_factors,
    yarn_attention,
)
from alight_converters.families import Family, family_of_gguf
from alight_converters.read_gguf_tokenizer import tokenizer_files

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_gguf(file: Path, folder: Path) -> Checkpoint:
    """Write the model of a GGUF (of a split one: any part) as a checkpoint to `folder`.

    Raises:
        InvalidModelFile: damaged, or parts are missing. Unsupported: a family, tokenizer or rope scaling that
        alight does not know. BadInput: `folder` exists. DiskFull: no room.
    """
    parts = parts_of(file)
    header = read_header(parts[0])  # checks the file, which GGUFReader does not
    family = family_of_gguf(header.architecture)
    tensors = {t.name: t for part in parts for t in GGUFReader(part).tensors}
    config = _config(family, header, tensors)
    files = tokenizer_files(header)
    return write(folder, config, _checkpoint_tensors(family, config, tensors), files=files)


def _config(family: Family, header: GGUFHeader, tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = family.model_types[0]
    given = {ours: header.get(theirs) for ours, theirs in (USUAL | dict(family.gguf_keys)).items()}
    config: dict[str, Any] = {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        "model_type": model_type,
        "_name_or_path": header.metadata.get("general.name", ""),
        "dtype": "float32",
    }
    given["num_key_value_heads"] = given["num_key_value_heads"] or given["num_attention_heads"]
    config |= {key: value for key, value in given.items() if value is not None}
    if missing := [theirs for ours, theirs in USUAL.items() if ours not in config and ours != "vocab_size"]:
        raise InvalidModelFile(f"the GGUF lacks {header.architecture}.{missing[0]}", hint="It is incomplete.")
    if "token_embd.weight" not in tensors:
        raise InvalidModelFile(
            "the GGUF has no token_embd.weight", hint="It is no language model, or incomplete."
        )
    config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    config["head_dim"] = header.get("attention.key_length") or (
        config["hidden_size"] // config["num_attention_heads"]
    )
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["rope_parameters"] = _rope(header, config, tensors)
    if window := header.get(SLIDING_WINDOW):
        config["sliding_window"] = window
    if isinstance(local := header.get(SLIDING_LAYERS), list):  # else the family's usual ones
        config["layer_types"] = ["sliding_attention" if x else "full_attention" for x in local]
    for key, bias in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_down.bias")):
        config[key] = bias in tensors
    for key, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{key}_token_id"] = header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    return config | family.unsaid(config)


def _rope(header: GGUFHeader, config: dict[str, Any], tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(header.get("rope.freq_base", 10000.0)),
    }
    rotated = header.get("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        rope["partial_rotary_factor"] = rotated / config["head_dim"]
    kind, factor = header.get("rope.scaling.type", "none"), header.get("rope.scaling.factor")
    original = header.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    if "rope_freqs.weight" in tensors:
        rope |= _llama3(rope["rope_theta"], rotated, _values(tensors["rope_freqs.weight"]))
    elif kind == "linear" and factor:
        rope |= {"rope_type": "linear", "factor": float(factor)}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
        betas = {k: header.get(f"rope.scaling.yarn_{k}") for k in ("beta_fast", "beta_slow")}
        rope |= {k: float(v) for k, v in betas.items() if v is not None}
        if scaled := header.get("rope.scaling.attn_factor"):
            rope["attention_factor"] = scaled * yarn_attention(float(factor))
    elif kind == "longrope":
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        rope |= {
            f"{w}_factor": _values(tensors[f"rope_factors_{w}.weight"]).tolist() for w in ("long", "short")
        }
        if scaled := header.get("rope.scaling.attn_factor"):
            rope["attention_factor"] = float(scaled)
    if header.architecture == "gemma3":
        local = float(header.get("rope.freq_base_swa", 10000.0))
        return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return rope


def _llama3(theta: float, rotated: int, divisors: torch.Tensor) -> dict[str, Any]:
    """Llama 3's settings, of which a GGUF has only what they come to: those of its makers, if they fit."""
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": round(float(divisors.max()), 4)} | _LLAMA3
    if not torch.allclose(llama3_factors(rope, rotated), divisors, rtol=1e-4):
        raise Unsupported(
            "the GGUF's rope factors are not Llama 3's", hint="Give the original Hugging Face checkpoint."
        )
    return rope


def _checkpoint_tensors(
    family: Family, config: dict[str, Any], tensors: dict[str, ReaderTensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    modules = [
        f"{family.layers}.{n}.{m}" for n in range(config["num_hidden_layers"]) for m in family.gguf_modules
    ]
    modules += [family.embedding, family.final_norm, family.head]
    names = (f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))
    ours = {gguf_name(family, name): name for name in names}
    for theirs, tensor in tensors.items():
        if theirs.startswith("rope_"):
            continue
        if theirs not in ours:
            raise Unsupported(
                f"tensor {theirs!r} of the GGUF is not part of a {family.name}",
                hint="Give the original Hugging Face checkpoint.",
            )
        values = _values(tensor)
        yield ours[theirs], from_gguf(family, config, ours[theirs], values)


def _values(tensor: ReaderTensor) -> torch.Tensor:
    """The values in float32, outermost axis first."""
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise BadInput(
            f"tensor {tensor.name!r} is {tensor.tensor_type.name}, which alight cannot read",
            hint="Give the original checkpoint.",
        ) from error
    shape = [int(n) for n in reversed(tensor.shape)]
    return torch.from_numpy(values.astype("float32", copy=True)).reshape(shape)
