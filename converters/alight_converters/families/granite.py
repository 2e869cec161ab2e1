"""Granite 3, the dense models: a Llama with four constant factors."""

from alight_converters.families.family import Family

FAMILY = Family(
    name="Granite",
    model_types=("granite",),
    gguf="granite",
    gguf_keys={
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "attention_multiplier": "attention.scale",
        "logits_scaling": "logit_scale",
    },
    rope_in_pairs=True,
    rope_tables=("llama3", "longrope"),
)
