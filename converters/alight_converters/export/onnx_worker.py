"""The process in which onnxruntime-genai's model builder writes decoder graphs in float.

The builder is a program, not a library: it changes `sys.path` and prints its progress. It is given several
checkpoints at once, because starting it takes longer than a small model does.

What the builder knows of a config, it has from transformers 4, and much of it is silently left out: sliding
windows where every layer has one, linear and YaRN ropes, the second rope of Gemma 3. Here it is told
(`_told`), and the tables of rotary embeddings are computed by transformers itself (`_with_ropes`).
"""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The builder has GroupQueryAttention in float16 for GPUs alone, though ONNX Runtime's CPU has it too: float16
# is built as for a GPU, without what only GPUs have.
_PROVIDERS = {"fp32": "cpu", "fp16": "cuda"}
_OPTIONS = (
    "hf_token=false",
    "windowed_kv_cache=false",  # all layers keep all positions, so that any runtime can hold the cache
    "fuse_qk_norm_gqa=false",  # no CPU has it
)
_MODELS = (
    "LlamaModel", "MistralModel", "QwenModel", "Qwen3Model", "Gemma2Model", "Gemma3Model", "Phi3MiniModel",
    "Phi3MiniLongRoPEModel", "GraniteModel",
)  # fmt: skip


def main() -> int:
    """Requests come by stdin, a JSON list; answers go to stdout: for each, what went wrong, or an empty string."""
    requests = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        builder = _builder()
        answers = [_answer(builder, request) for request in requests]
    print(json.dumps(answers))
    return 0


def _builder() -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    package = find_spec("onnxruntime_genai")
    folders = (package.submodule_search_locations if package else None) or []
    sys.path[:0] = [str(Path(folder) / "models") for folder in folders]
    import builder  # type: ignore[import-not-found]

    builder.Gemma2Model = _exact(builder.Gemma2Model)
    builder.Gemma3Model = _exact(_with_two_ropes(builder.Gemma3Model))
    for name in _MODELS:
        setattr(builder, name, _with_ropes(getattr(builder, name)))
    return builder


def _answer(builder: Any, request: dict[str, str]) -> str:
    try:
        _build(builder, request["source"], request["target"], request["type"])
    except Exception as error:  # whatever it is, the other requests are not to blame
        return f"{type(error).__name__}: {error}"
    return ""


def _build(builder: Any, source: str, target: str, type: str) -> None:
    cache = str(
        Path(target) / "cache"
    )  # nothing is downloaded; the builder wants to know a folder all the same
    where = ("", source, target, type, _PROVIDERS[type], cache)
    options = builder.parse_extra_options(*where, list(_OPTIONS))
    _tell(options["hf_details"]["hf_config"])
    builder.create_model(*where, **options)


def _tell(config: Any) -> None:
    """Put into a config what transformers takes for granted and the builder wants spelled out."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    if getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    if config.model_type == "phi3" and config.rope_parameters["rope_type"] != "longrope":
        config.original_max_position_embeddings = (
            config.max_position_embeddings
        )  # or the builder makes two tables


def _with_ropes(model: Any) -> Any:
    """A model whose rotary tables are those of transformers, for any scaling that needs one table or two."""
    import torch
    from transformers import AutoModelForCausalLM

    class Ropes(model):  # type: ignore[misc]
        def make_rope_init(self, config: Any) -> None:
            rope = config.rope_parameters
            if model.__name__.endswith("LongRoPEModel"):
                factors = ("short_factor", "long_factor", "short_mscale", "long_mscale")
                self.rope_attrs["multi_cache"] = dict.fromkeys(factors, 1)  # read by what is overridden here
            elif rope.get("rope_type") == "longrope" and self.context_length > self.original_context_length:
                raise NotImplementedError("longrope is known of Phi-3 only")
            with torch.device("meta"):
                like = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            self.rotary = type(like.model.rotary_emb)(config)
            self.kinds = ("full_attention",) if "full_attention" in rope else ()
            self.rotated = self.rotary_table(1)[0].shape[-1]
            self.rope_attrs["partial_rotary_factor"] = self.rotated / self.head_size
            self.rope_attrs["rotary_embedding_dim"] = self.rotated if self.rotated < self.head_size else 0

        def is_fused_rope_supported(self) -> bool:
            return bool(self.rotated % 16 == 0)  # what GroupQueryAttention can do

        def is_packed_matmul_supported(self) -> bool:
            return self.is_fused_rope_supported() and bool(super().is_packed_matmul_supported())

        def make_rotary_embedding_caches_from_scratch(self) -> tuple[Any, Any]:
            return self.rotary_table(self.rope_attrs["cache_length"])

        def rotary_table(self, length: int) -> tuple[Any, Any]:
            cos, sin = self.rotary(torch.zeros(1), torch.arange(length)[None], *self.kinds)
            return cos[0], sin[0]

    return Ropes


def _with_two_ropes(gemma: Any) -> Any:
    """Gemma 3, whose layers have one of two ropes."""

    class TwoRopes(gemma):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any) -> None:
            config.rope_local_base_freq = 0.0  # the builder reads it, and its tables would be made from it
            super().__init__(config, *args)

        def make_rotary_embedding_multi_cache(self) -> None:
            self.cos_cache_global_name, self.sin_cache_global_name = "cos_cache_global", "sin_cache_global"
            self.cos_cache_local_name, self.sin_cache_local_name = "cos_cache_local", "sin_cache_local"
            for kind, name in (("full_attention", "global"), ("sliding_attention", "local")):
                self.kinds = (kind,)
                self.rope_attrs["create_caches"] = True
                self.make_rotary_embedding_caches(
                    cos_cache_name=f"cos_cache_{name}", sin_cache_name=f"sin_cache_{name}"
                )

    return TwoRopes


def _exact(gemma: Any) -> Any:
    """Gemma without the builder's roundings: embeddings scaled to two decimals, 1 + norm in the checkpoint's type."""

    class Exact(gemma):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any) -> None:
            super().__init__(config, *args)
            self.embed_attrs["scale"] = math.sqrt(self.hidden_size)

        def load_weights(self, input_path: str) -> Any:
            return super().load_weights(input_path).float()

    return Exact


if __name__ == "__main__":
    sys.exit(main())
