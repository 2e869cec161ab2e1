"""Llama 2 and 3, SmolLM2, and whatever else is a Llama by another name."""

from alight_converters.families.family import Family

FAMILY = Family(
    name="Llama",
    model_types=("llama",),
    gguf="llama",
    rope_in_pairs=True,
    rope_tables=("llama3", "longrope"),
)
