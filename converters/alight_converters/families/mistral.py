"""Mistral 7B and Nemo. In GGUF it is a Llama: llama.cpp attends to everything, without Mistral 0.1's window."""

from alight_converters.families.family import Family

FAMILY = Family(
    name="Mistral",
    model_types=("mistral",),
    gguf="llama",
    rope_in_pairs=True,
    rope_tables=("llama3", "longrope"),
)
