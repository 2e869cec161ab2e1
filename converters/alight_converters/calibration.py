"""Calibration: the token rows that passes look at activations and train on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alight.errors import BadInput
from alight_converters.documents import documents
from alight_converters.memory import RowsAtOnce

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alight_converters.checkpoint import Checkpoint

ROWS_AT_ONCE = 32  # rows sampled together: they share each read of the weights, and their KV cache is small


@dataclass(frozen=True)
class Calibration:
    """Rows of token ids.

    Attributes:
        rows: shape (rows, length), int64, on the CPU. No padding: every token counts.
        origin: where the text came from, for the report.
    """

    rows: torch.Tensor
    origin: str

    @classmethod
    def of_text(
        cls,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        length: int,
        *,
        fewest: int | None = None,
        origin: str = "text",
    ) -> Calibration:
        """The first `rows` pieces of `length` tokens of a text.

        Args:
            fewest: rows that will do where the text is shorter; None: all.

        Raises:
            BadInput: it is too short.
        """
        return cls(_pack([_tokens(text, tokenizer)], tokenizer, rows, length, origin, fewest), origin)

    @classmethod
    def of_file(
        cls,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        length: int,
        *,
        fewest: int | None = None,
    ) -> Calibration:
        """Rows from a file, or from all files of a folder, such as a data set of the hub.

        `.txt` and `.md` are one document each. A row of `.jsonl` or `.json` is a document: `{"text": …}`, or
        `{"messages": [{"role": …, "content": …}, …]}`, which goes through the checkpoint's chat template. `.csv`
        has a column `text`; `.parquet` and `.arrow` have `text` or `messages`, and need pyarrow. Documents follow
        each other as in pretraining, ended by the end-of-text token (chats end as their template says); reading
        stops when the rows are full. `fewest` is as in `of_text`.

        Raises:
            BadInput: no such file, a row that is none of these, too short. Unsupported: another format.
            MissingExtra: pyarrow is not installed.
        """
        tokens = (_tokens(document, tokenizer) for document in documents(path, tokenizer))
        return cls(_pack(tokens, tokenizer, rows, length, str(path), fewest), path.name)

    @classmethod
    def sampled(
        cls,
        checkpoint: Checkpoint,
        rows: int,
        length: int,
        seed: int = 0,
        device: str = "cpu",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Calibration:
        """Text that the model writes itself, at temperature 1: nothing to download, and its own distribution.

        "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models" (Liu et al., 2023). Each
        row begins with the token that begins a document (BOS, or end-of-text where there is none), so its
        first word comes from the model's own distribution too; after an end of text a new one begins.
        """
        limit = int(checkpoint.config.get("max_position_embeddings", length))
        if not 2 <= length <= limit or rows < 1:
            raise BadInput(
                f"{rows} rows of {length} tokens cannot be sampled from {checkpoint.folder.name}",
                hint=f"A row has 2 to {limit} tokens.",
            )
        start, end = _first_and_last(checkpoint)
        model = checkpoint.load(device=device)
        generator = torch.Generator().manual_seed(seed)
        at_once = RowsAtOnce(
            ROWS_AT_ONCE,
            f"sampling calibration text of {length} tokens",
            f"Set a calibration.length below {length}, or use a device with more memory.",
        )
        made: list[torch.Tensor] = []
        done = 0
        while done < rows:
            before = generator.get_state()

            def draw(at_once: int, left: int = rows - done, before: torch.Tensor = before) -> torch.Tensor:
                generator.set_state(before)
                first = torch.full((min(at_once, left), 1), start)
                return _continue(model, first, length, end, generator)

            made.append(at_once.run(draw))
            done += len(made[-1])
            if progress:
                progress("sampling calibration text", done, rows)
        return cls(torch.cat(made), f"sampled from {checkpoint.folder.name}, seed {seed}")

    @property
    def tokens(self) -> int:
        return self.rows.numel()

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()}"

    def first(self, rows: int) -> Calibration:
        """The first rows only. Raises BadInput where there are fewer."""
        if rows > len(self.rows):
            raise BadInput(
                f"the calibration text has {len(self.rows)} rows of {self.rows.shape[1]} tokens, {rows} are wanted",
                hint="Give a longer text.",
            )
        return Calibration(self.rows[:rows], self.origin)

    def at_most(self, tokens: int) -> Calibration:
        """As many of the first rows as hold `tokens` tokens, but one at least."""
        return Calibration(self.rows[: max(1, tokens // self.rows.shape[1])], self.origin)


def _pack(
    documents: Iterable[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    length: int,
    origin: str,
    fewest: int | None = None,
) -> torch.Tensor:
    """Documents one after the other, cut into rows; each row starts as the tokenizer starts a text."""
    prefix = _prefix(tokenizer)
    if rows < 1 or length <= len(prefix):
        raise BadInput(f"{rows} rows of {length} tokens is no calibration", hint="Ask for at least one row.")
    piece = length - len(prefix)
    stream: list[int] = []
    for document in documents:
        stream += document
        if len(stream) >= rows * piece:
            break
    whole = len(stream) // piece
    least = rows if fewest is None else fewest
    if whole < least:
        raise BadInput(
            f"{origin} has {len(stream):,} tokens: {whole} rows of {length}, and {least} "
            f"({least * piece:,} tokens) are wanted",
            hint="Give a longer text, or ask for fewer or shorter rows.",
        )
    rows = min(rows, whole)
    return torch.tensor([prefix + stream[i * piece : (i + 1) * piece] for i in range(rows)])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: BOS, or nothing."""
    empty = list(tokenizer("").input_ids)
    return empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _first_and_last(checkpoint: Checkpoint) -> tuple[int, int | None]:
    """Token ids that begin and end a document."""
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config
    end = tokenizer.eos_token_id
    for start in (tokenizer.bos_token_id, config.get("bos_token_id"), end):
        if start is not None:
            return int(start), end
    raise BadInput(
        f"{checkpoint.folder.name} has neither a BOS nor an end-of-text token to begin a text with",
        hint="Give a calibration text.",
    )


@torch.inference_mode()
def _continue(
    model: torch.nn.Module, first: torch.Tensor, length: int, end: int | None, generator: torch.Generator
) -> torch.Tensor:
    """Rows of `length` tokens after `first`, shape (rows, 1); probabilities are drawn from on the CPU, so
    that a seed means the same on every device."""
    device = next(model.parameters()).device
    row, cache = [first], None
    for _ in range(length - 1):
        result = model(input_ids=row[-1].to(device), past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        chances = result.logits[:, -1].float().softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator)
        row.append(drawn if end is None else torch.where(row[-1] == end, first, drawn))
    return torch.cat(row, dim=1)
