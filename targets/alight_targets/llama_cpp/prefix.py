"""Which sequence in the KV cache holds the longest common beginning of a prompt: a radix tree over tokens.

This is what lets a conversation's next turn, or another user with the same system prompt, start where the
keys and values that are already there end (PagedAttention and RadixAttention do the same for vLLM and SGLang).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """A run of tokens, and the sequences whose tokens pass through the whole of it."""

    run: list[int]
    owners: set[int] = field(default_factory=set)
    children: dict[int, _Node] = field(default_factory=dict)  # by first token


class PrefixIndex:
    """A radix tree of the tokens of sequences, each known by a number."""

    def __init__(self) -> None:
        self._root = _Node([])
        self._held: dict[int, list[int]] = {}

    def __contains__(self, owner: int) -> bool:
        return owner in self._held

    def __len__(self) -> int:
        return len(self._held)

    def tokens(self, owner: int) -> list[int]:
        """The tokens that `owner` was last inserted with."""
        return self._held[owner]

    def insert(self, owner: int, tokens: Sequence[int]) -> None:
        """Note that `owner` holds `tokens` now. Longer than before is cheap; anything else replaces it."""
        new = list(tokens)
        old = self._held.get(owner, [])
        if new[: len(old)] != old:
            self.remove(owner)
        self._held[owner] = new
        node, at = self._root, 0
        while at < len(new):
            child = node.children.get(new[at])
            if child is None:
                child = node.children[new[at]] = _Node(new[at:])
            else:
                same = _common(child.run, new, at)
                if same < len(child.run):
                    child = self._split(node, child, same)
            child.owners.add(owner)
            node, at = child, at + len(child.run)

    def remove(self, owner: int) -> None:
        """Forget a sequence, and the nodes that only it used."""
        tokens = self._held.pop(owner, [])
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children[tokens[at]]
            child.owners.discard(owner)
            at += len(child.run)
            if not child.owners:
                del node.children[child.run[0]]
                return  # nobody else is below: they would be owners here too
            node = child

    def longest(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The sequence with the longest common beginning, and its length in tokens; (-1, 0) if there is none."""
        node, at, owner = self._root, 0, -1
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                break
            same = _common(child.run, tokens, at)
            owner = next(iter(child.owners))
            at += same
            if same < len(child.run):
                break
            node = child
        return owner, at

    def _split(self, parent: _Node, child: _Node, at: int) -> _Node:
        """Cut a run in two; returns the upper half."""
        upper = _Node(child.run[:at], set(child.owners), {child.run[at]: child})
        child.run = child.run[at:]
        parent.children[upper.run[0]] = upper
        return upper


def _common(run: list[int], tokens: Sequence[int], at: int) -> int:
    """How many tokens of `run` stand at `tokens[at:]`."""
    part = tokens[at : at + len(run)]
    if part == run:  # compared in C; the usual case
        return len(run)
    return next(
        (i for i, (a, b) in enumerate(zip(run, part, strict=False)) if a != b), min(len(run), len(part))
    )
