"""Where a student comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alight.errors import BadInput
from alight_converters.checkpoint import Checkpoint


def random_student(teacher: Checkpoint, changes: dict[str, Any], folder: Path, seed: int) -> Checkpoint:
    """A checkpoint with random weights, of the teacher's family and tokenizer.

    Args:
        changes: to the teacher's config, for example {"num_hidden_layers": 8}.

    Raises:
        BadInput: a key the teacher's config lacks, or sizes that do not fit each other.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    unknown = sorted(set(changes) - set(teacher.config))
    if unknown:
        raise BadInput(
            f"the config of {teacher.folder.name} has no {unknown[0]!r}",
            hint=f"Sizes it has: {', '.join(k for k, v in sorted(teacher.config.items()) if type(v) is int)}.",
        )
    if folder.exists():
        return Checkpoint.open(folder)
    config = AutoConfig.from_pretrained(teacher.folder, local_files_only=True, **changes)
    if "hidden_size" in changes and "head_dim" not in changes and getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // config.num_attention_heads
    torch.manual_seed(seed)
    make: Any = AutoModelForCausalLM
    try:
        model = make.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"no model has these sizes: {error}", hint=f"The changes were {changes}.") from error
    return teacher.with_model(model, folder)
