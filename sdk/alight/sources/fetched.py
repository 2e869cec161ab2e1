"""What every source gives back, and the short name it suggests."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called often with (file name, bytes done, bytes in all or 0 when unknown). Raising in it stops it."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model's files on disk, complete and checked, not yet in the store.

    Attributes:
        files: path inside the model -> file on disk. A path never leaves the model's folder.
        format: "gguf" or "safetensors".
        source: the canonical source; `fetch(source)` gives the same bytes again.
        name: a suggested short name, lower case.
        licence: SPDX or the hub's licence id, where the source states one.
        temporary: True when the files are alight's own download, which may be moved away;
            False when they belong to the user or to a package: link or copy them.
        digests: path -> "sha256:…" where the source promised one. It was checked.
    """

    files: dict[str, Path]
    format: str
    source: str
    name: str
    licence: str | None
    temporary: bool
    digests: dict[str, str]


# How GGUF file names end: Q4_K_M, UD-Q4_K_XL, IQ3_XXS, TQ1_0, MXFP4, BF16, F16, …
_PACKAGING = re.compile(
    r"[-._](gguf|(ud-)?i?q\d(_[a-z0-9]{1,3})*|tq\d_\d|mxfp4(_moe)?|bf16|f16|f32|fp16|fp32)$"
)


def short_name(text: str) -> str:
    """A name for the store: lower case, without what only tells the packaging.

    >>> short_name("SmolLM2-135M-Instruct.Q4_1"), short_name("SmolLM2-135M-Instruct-GGUF")
    ('smollm2-135m-instruct', 'smollm2-135m-instruct')
    """
    name = text.lower()
    while (stripped := _PACKAGING.sub("", name)) != name:
        name = stripped
    # What is left must be an OCI repository name: words with one separator between them.
    name = re.sub(r"[^a-z0-9._-]+|[._-]{2,}", "-", name).strip("-._")
    return name or "model"
