"""Calibration: the token rows that passes look at activations and train on."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alight.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alight_converters.checkpoint import Checkpoint

ROWS_AT_ONCE = 32  # rows sampled together: they share each read of the weights, and their KV cache is small
_TEXTS = (".txt", ".md")
_TABLES = (".jsonl", ".csv")


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
        origin: str = "text",
    ) -> Calibration:
        """The first `rows` pieces of `length` tokens of a text. Raises BadInput where it is too short."""
        return cls(_pack([_tokens(text, tokenizer)], tokenizer, rows, length, origin), origin)

    @classmethod
    def of_file(cls, path: Path, tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> Calibration:
        """Rows from a file, or from all files of a folder, such as a data set of the hub.

        `.txt` and `.md` are one document each. A line of `.jsonl` is a document: `{"text": …}`, or
        `{"messages": [{"role": …, "content": …}, …]}`, which goes through the checkpoint's chat template.
        `.csv` has a column `text`. Documents follow each other as in pretraining, ended by the
        end-of-text token (chats end as their template says); reading stops when the rows are full.

        Raises:
            BadInput: no such file, a line that is none of these, too short. Unsupported: another format.
        """
        documents = (_tokens(document, tokenizer) for document in _documents(path, tokenizer))
        return cls(_pack(documents, tokenizer, rows, length, str(path)), path.name)

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
        made = []
        for done in range(0, rows, ROWS_AT_ONCE):
            row = torch.full((min(ROWS_AT_ONCE, rows - done), 1), start)
            made.append(_continue(model, row, length, end, generator))
            if progress:
                progress("sampling calibration text", min(done + ROWS_AT_ONCE, rows), rows)
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
    if len(stream) < rows * piece:
        raise BadInput(
            f"{origin} has {len(stream):,} tokens: {len(stream) // piece} rows of {length}, and {rows} "
            f"({rows * piece:,} tokens) are wanted",
            hint="Give a longer text, or ask for fewer or shorter rows.",
        )
    return torch.tensor([prefix + stream[i * piece : (i + 1) * piece] for i in range(rows)])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: BOS, or nothing."""
    empty = list(tokenizer("").input_ids)
    return empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _documents(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The documents of a file or folder, as text with its special tokens spelled out."""
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (*_TEXTS, *_TABLES))
        if not files:
            raise BadInput(f"{path} has no {', '.join((*_TEXTS, *_TABLES))} files", hint=_CONVERT)
        for file in files:
            yield from _documents(file, tokenizer)
        return
    if not path.is_file():
        raise BadInput(f"no calibration file {path}", hint="Give a file or folder of text.")
    if path.suffix not in (*_TEXTS, *_TABLES):
        raise Unsupported(f"{path.name}: calibration from {path.suffix or 'such'} files", hint=_CONVERT)
    end = tokenizer.eos_token or ""
    try:
        if path.suffix in _TEXTS:
            yield path.read_text(encoding="utf-8") + end
        elif path.suffix == ".csv":
            yield from (text + end for text in _csv_texts(path))
        else:
            yield from _jsonl_texts(path, tokenizer, end)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8: {error}", hint="Convert it with iconv.") from error


_CONVERT = "Supported are .txt, .md, .jsonl and .csv; `datasets` writes a parquet set with .to_json(FILE)."


def _csv_texts(path: Path) -> Iterator[str]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8", newline="") as opened:
        reader = csv.DictReader(opened)
        if "text" not in (reader.fieldnames or ()):
            raise BadInput(f"{path} has no column 'text', only {', '.join(reader.fieldnames or ())}")
        yield from (row["text"] or "" for row in reader)


def _jsonl_texts(path: Path, tokenizer: PreTrainedTokenizerBase, end: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise BadInput(f"{path} line {number} is not JSON: {error}") from error
            if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
                yield _chat(entry["messages"], tokenizer, f"{path} line {number}")
            elif isinstance(entry, dict) and isinstance(entry.get("text"), str):
                yield entry["text"] + end
            else:
                raise BadInput(
                    f"{path} line {number} has neither a 'text' nor 'messages'",
                    hint='A line is {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}.',
                )


def _chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if not tokenizer.chat_template:
        raise BadInput(
            f"{where} is a chat, and the checkpoint's tokenizer has no chat template",
            hint='Give lines of {"text": …}, or a checkpoint that is made for chat.',
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program: it may fail in any way
        raise BadInput(f"{where}: the chat template refuses it: {error}") from error


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
