"""Qwen2 and Qwen2.5, and DeepSeek-R1-Distill-Qwen."""

from alight_converters.families.family import Family

FAMILY = Family(name="Qwen2", model_types=("qwen2",), gguf="qwen2")
