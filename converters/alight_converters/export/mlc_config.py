"""`mlc-chat-config.json`: what mlc_llm, web-llm and alight's target read before a model of MLC.

The fields are mlc_llm's (python/mlc_llm/protocol/mlc_chat_config.py, and the config class of each model); it ignores
those that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alight.errors import BadInput, InvalidModelFile, Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.gguf_metadata import head_size
from alight_converters.export.mlc_conversation import Tokens, conversation
from alight_converters.export.mlc_modes import Mode
from alight_converters.export.mlc_names import naming_of
from alight_converters.tokenizer_files import SPACE, read_json, read_settings, read_template, token_text

NAME = "mlc-chat-config.json"
_CHUNK = 1024  # tokens of a prompt at once: what web-llm's own models are compiled for
_STREAMS = 128  # most sequences at once that a library plans for; mlc_llm's default
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "vocab_size",
)  # fmt: skip
_GEMMA = (
    "hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types",
    "final_logit_softcapping",
)  # fmt: skip
# What a family's config has besides, under transformers' names. (Not all of them mean something to mlc_llm.)
_OWN = {
    "llama": ("tie_word_embeddings",),
    "qwen2": ("tie_word_embeddings", "hidden_act"),
    "qwen3": ("tie_word_embeddings", "hidden_act", "attention_bias"),
    "gemma2": (*_GEMMA, "attn_logit_softcapping"),
    "gemma3_text": _GEMMA,
    "phi3": ("tie_word_embeddings", "max_position_embeddings"),
}
# Rope scalings that its models have. (mlc_llm's own compiler leaves out Gemma 3's, and the base of its local layers.)
_SCALINGS = {"llama": ("llama3",), "phi3": ("longrope",), "gemma3_text": ("linear",)}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_SAMPLING = {
    "temperature": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "top_p": 1.0,
}  # fmt: skip  # mlc_llm's defaults


def context_size(checkpoint: Checkpoint, wanted: int | None) -> int:
    """Tokens of context; unless told, as many as the model was trained for and MLC computes exactly.

    Raises:
        BadInput: more are wanted than it was trained for. Unsupported: more than its attention looks back, which only
        MLC's Gemma heeds.
    """
    config = checkpoint.full_config
    trained = int(config["max_position_embeddings"])
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    exact = min(trained, window) if window and not checkpoint.family.sliding_window else trained
    if wanted is not None and wanted > trained:
        raise BadInput(
            f"a context of {wanted} tokens is wanted; the model was trained for {trained}",
            hint=f"Give {exact} or fewer.",
        )
    if wanted is not None and wanted > exact:
        raise Unsupported(
            f"a context of {wanted} tokens is wanted; the model looks {window} back, which MLC has not for "
            f"{checkpoint.family.name}",
            hint=f"Give {exact} or fewer, or use another format, such as ONNX.",
        )
    return wanted or exact


def model_config(checkpoint: Checkpoint, context: int) -> dict[str, Any]:
    """The sizes of a model as mlc_llm's compiler takes them.

    Raises:
        Unsupported: mlc_llm's model of this family cannot compute it.
    """
    config, family = checkpoint.full_config, checkpoint.family
    model_type = naming_of(checkpoint).model_type
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation != family.activation:
        raise Unsupported(
            f"its activation is {activation}; MLC has {family.activation} for {family.name}",
            hint="Use another format, such as ONNX.",
        )
    found = {name: config[name] for name in (*_SIZES, *_OWN[model_type])}
    found |= _rope(checkpoint, model_type)
    return found | {
        "head_dim": head_size(config),
        "context_window_size": context,
        "prefill_chunk_size": min(context, _CHUNK),
        "tensor_parallel_shards": 1,
        "max_batch_size": _STREAMS,
    }


def chat_config(
    checkpoint: Checkpoint, mode: Mode, context: int, tokenizer: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole file, but for the list `tokenizer_files`.

    Args:
        tokenizer: the content of `tokenizer.json`.
    """
    sizes = model_config(checkpoint, context)
    said = _generation(checkpoint)
    tokens, vocabulary = _tokens(checkpoint, tokenizer, said)
    return {
        "version": "0.1.0",
        "model_type": naming_of(checkpoint).model_type,
        "quantization": mode.name,
        "model_config": sizes,
        "vocab_size": sizes["vocab_size"],
        "context_window_size": context,
        "sliding_window_size": -1,
        "prefill_chunk_size": sizes["prefill_chunk_size"],
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": min(vocabulary, sizes["vocab_size"]),
        **{key: usual if said.get(key) is None else said[key] for key, usual in _SAMPLING.items()},
        "tokenizer_info": tokenizer_info(tokenizer),
        "conv_template": conversation(read_template(checkpoint.folder), tokens),
        **{key: said[key] for key in _TOKENS if said.get(key) is not None},
        "model_task": "chat",
        "embedding_metadata": None,
    }


def tokenizer_info(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are put together to a text, in mlc_llm's terms (cpp/tokenizers/tokenizers.cc)."""
    decoders = _steps(tokenizer.get("decoder"), "decoders")
    kinds = [step["type"] for step in decoders if step["type"] in ("ByteLevel", "ByteFallback")]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    prepend = {"type": "Prepend", "prepend": SPACE}
    return {
        "token_postproc_method": "byte_level" if kinds[-1:] == ["ByteLevel"] else "byte_fallback",
        "prepend_space_in_encode": prepend in _steps(tokenizer.get("normalizer"), "normalizers"),
        "strip_space_in_decode": strip in decoders,
    }


def _rope(checkpoint: Checkpoint, model_type: str) -> dict[str, Any]:
    """The rotary embedding. Its base has two names, of which each model of mlc_llm reads one."""
    config = checkpoint.full_config
    rope = config["rope_parameters"]
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "default")
    if kind != "default" and kind not in _SCALINGS.get(model_type, ()):
        raise Unsupported(
            f"MLC has no rope scaling {kind!r} for {checkpoint.family.name}",
            hint="Remove it from config.json and use the shorter context, or use another format.",
        )
    found: dict[str, Any] = {"rope_theta": rope["rope_theta"], "position_embedding_base": rope["rope_theta"]}
    if model_type in _SCALINGS:
        found["rope_scaling"] = None if kind == "default" else {**rope, "rope_type": kind, "type": kind}
    if local:
        found["rope_local_base_freq"] = local["rope_theta"]
    if model_type == "phi3":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found["original_max_position_embeddings"] = original
        found["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
    return found


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model's files say about generating, `generation_config.json` before `config.json`."""
    file = checkpoint.folder / "generation_config.json"
    given = read_json(file) if file.is_file() else {}
    return {key: checkpoint.full_config.get(key) for key in _TOKENS} | {
        key: value for key, value in given.items() if value is not None
    }


def _tokens(
    checkpoint: Checkpoint, tokenizer: Mapping[str, Any], said: Mapping[str, Any]
) -> tuple[Tokens, int]:
    """The tokens that matter in a conversation, and the number of all tokens."""
    from tokenizers import Tokenizer

    settings = read_settings(checkpoint.folder)
    try:
        reader = Tokenizer.from_str(json.dumps(tokenizer))
    except Exception as error:  # tokenizers raises nothing more exact
        raise InvalidModelFile(f"the tokenizer of {checkpoint.folder.name} is not usable: {error}") from error
    bos = token_text(settings.get("bos_token"))
    if not bos and isinstance(said.get("bos_token_id"), int):
        bos = reader.id_to_token(said["bos_token_id"]) or ""
    adds_bos = settings.get("add_bos_token")
    if adds_bos is None:
        adds_bos = bool(bos) and reader.token_to_id(bos) in reader.encode("a").ids[:1]
    eos = said.get("eos_token_id")
    ends = {reader.token_to_id(token_text(settings.get("eos_token")))} | {
        *(eos if isinstance(eos, list) else [eos])
    }
    rows = checkpoint.full_config["vocab_size"]
    added = {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or () if t["id"] < rows}
    known = tuple(sorted(number for number in ends if isinstance(number, int)))
    return Tokens(added, bos, bool(adds_bos), known), reader.get_vocab_size(with_added_tokens=True)


def _steps(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    return list(step[inner]) if step and step["type"] == "Sequence" else [step] if step else []
