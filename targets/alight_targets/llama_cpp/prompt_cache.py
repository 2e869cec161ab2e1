"""Keys and values of long shared prompts on disk, so that a system prompt survives a restart."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np

from alight_targets.llama_cpp.prefix import PrefixIndex

log = logging.getLogger("alight.llama_cpp")

SHORTEST = 64  # tokens; reading fewer again is quicker than a file
_MOST = 16  # prompts kept per model


class PromptCache:
    """A folder of saved sequences: NAME.kv has the state (of a unified cache), NAME.npy its tokens.

    Args:
        folder: one per model and KV type: the state of one does not fit another.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = PrefixIndex()
        self._files: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("*.npy"), key=lambda f: f.stat().st_mtime):
            try:
                tokens = np.load(file, allow_pickle=False).tolist()
            except (OSError, ValueError, EOFError) as error:
                log.warning("a saved prompt is damaged and is removed: %s", error)
                self._remove(file)
                continue
            self._index.insert(len(self._files), tokens)
            self._files.append(file)

    def has(self, tokens: list[int]) -> bool:
        """Is there a saved prompt that begins with all of these tokens?"""
        return self._index.longest(tokens)[1] == len(tokens)

    def restore(self, tokens: list[int]) -> tuple[int, bytes]:
        """How many of these tokens the best saved prompt begins with, and its state; (0, b"") without one."""
        owner, length = self._index.longest(tokens)
        try:
            return (
                (length, self._files[owner].with_suffix(".kv").read_bytes())
                if length >= SHORTEST
                else (0, b"")
            )
        except OSError as error:
            log.warning("a saved prompt cannot be read: %s", error)
            self._index.remove(owner)
            return 0, b""

    def save(self, state: bytes, tokens: list[int]) -> None:
        """Keep the state of a sequence that holds exactly `tokens`. The newest ones are kept."""
        if len(tokens) < SHORTEST or not state:
            return
        name = hashlib.sha256(np.array(tokens, np.int32).tobytes()).hexdigest()[:24]
        file, partial = self._folder / f"{name}.npy", self._folder / f"{name}.part"
        try:
            partial.write_bytes(state)
            partial.rename(file.with_suffix(".kv"))
            with partial.open("wb") as stream:
                np.save(stream, np.array(tokens, np.int32), allow_pickle=False)
            partial.rename(file)  # last: it makes the prompt visible
        except OSError as error:
            log.warning("a prompt could not be saved to %s: %s", self._folder, error)
            partial.unlink(missing_ok=True)
            return
        self._index.insert(len(self._files), tokens)
        self._files.append(file)
        live = [f for f in self._files if f.exists()]
        for old in live[:-_MOST]:
            self._index.remove(self._files.index(old))
            self._remove(old)

    @staticmethod
    def _remove(file: Path) -> None:
        file.unlink(missing_ok=True)
        file.with_suffix(".kv").unlink(missing_ok=True)
