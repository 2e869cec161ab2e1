"""The tokenizer and chat template of a model folder: tokenizer.json, and the small files beside it.

The `tokenizers` library reads and runs it. What it does not have, pieces as bytes (a token may end inside a
character), is made here from the vocabulary.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from alight.chat import ChatTemplate
from alight.errors import InvalidModelFile, MissingExtra

TOKENIZER = "tokenizer.json"
# Tokens that end a turn whether or not the model's files say so; llama.cpp goes by the same names.
_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
         "<|eom_id|>", "<EOT>", "[EOT]", "<|end_of_text|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>")  # fmt: skip
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


class Tokenizer:
    """The tokenizer of one model. Thread-safe.

    Args:
        folder: with tokenizer.json, and tokenizer_config.json, generation_config.json, genai_config.json or
            mlc-chat-config.json, and chat_template.jinja where it has them.
        extra: of alight that brings the libraries, for the message where they are missing.

    Attributes:
        vocabulary: tokens, the added ones counted. (The logits of a model may have more columns.)
        source: the content of tokenizer.json.
        bos: the id of the beginning token; -1 where there is none.
        adds_bos: whether a text begins with it.
        ends: ids that end a generation.

    Raises:
        InvalidModelFile: a file is missing or damaged. MissingExtra: `tokenizers` is not installed.
    """

    def __init__(self, folder: Path, extra: str) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingExtra("reading tokenizer.json", extra) from error
        path = folder / TOKENIZER
        self._settings = _Settings(folder)
        try:
            self.source = path.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(self.source)
            data = json.loads(self.source)
        except FileNotFoundError as error:
            raise InvalidModelFile(f"{folder.name} has no {TOKENIZER}", hint="Export it again.") from error
        except Exception as error:  # tokenizers raises nothing more exact
            raise InvalidModelFile(f"{path} is not usable: {error}", hint="Export it again.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._lock = threading.Lock()
        self._spelling = _Spelling.of(data)
        self._added = {int(t["id"]): t for t in data.get("added_tokens") or []}
        self._control = {number for number, token in self._added.items() if token["special"]}
        self._pieces: dict[int, bytes] = {}
        self.vocabulary = int(self._tokenizer.get_vocab_size(with_added_tokens=True))
        self.bos = next(self._ids(self._settings.bos()), -1)
        self.adds_bos = self._begins_with_bos()
        self.ends = frozenset([*self._ids(self._settings.ends()), *self._ids(_ENDS)])

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """See `Model.tokenize`. A lone surrogate is read as a question mark."""
        text = text.encode(errors="replace").decode()
        with self._lock:  # the setting belongs to the tokenizer and not to the call
            self._tokenizer.encode_special_tokens = not special
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if bos and self.adds_bos else list(ids)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        """See `Model.detokenize`."""
        pieces = [self.piece(token, special=special) for token in tokens]
        first = next((n for n, token in enumerate(tokens) if token not in self._control), None)
        if self._spelling.prefix and first is not None:  # the space that it puts before every text
            pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that one token adds to a running text; none for a control token, unless `special`."""
        if token in self._control and not special:
            return b""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._bytes(token)
        return known

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Added tokens count as control tokens in messages, but for those made of spaces."""
        texts = [token["content"] for _, token in sorted(self._added.items())]
        bos, eos = self._settings.texts()
        return ChatTemplate(
            self._settings.template(),
            bos=bos or (self._text(self.bos) if self.bos >= 0 else ""),
            eos=eos,
            control_tokens=[text for text in texts if text.strip(f" \n\r\t{_SPACE}")],
        )

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]["content"]).encode()
        text = self._tokenizer.id_to_token(token)
        return self._spelling.bytes(text) if text is not None else b""

    def _text(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""

    def _ids(self, tokens: Iterable[str | int]) -> Iterator[int]:
        """The ids among names and ids, where the vocabulary has them."""
        for token in tokens:
            number = self._tokenizer.token_to_id(token) if isinstance(token, str) else token
            if number is not None and self._tokenizer.id_to_token(number) is not None:
                yield number

    def _begins_with_bos(self) -> bool:
        said = self._settings.adds_bos()
        if said is not None:
            return said and self.bos >= 0
        return self.bos in self._tokenizer.encode("a", add_special_tokens=True).ids[:1]


class _Settings:
    """What the small files of a model folder say. Where several do, the first of them counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        genai, mlc = _read(folder / "genai_config.json"), _read(folder / "mlc-chat-config.json")
        self._tokenizer = _read(folder / "tokenizer_config.json")
        self._conversation = _mapping(mlc.get("conv_template"))
        self._files = [_mapping(genai.get("model")), _read(folder / "generation_config.json"), mlc]

    def bos(self) -> Iterator[str | int]:
        yield from self._first("bos")

    def ends(self) -> Iterator[str | int]:
        yield from self._first("eos")
        yield from _several(self._conversation.get("stop_token_ids"))

    def _first(self, which: str) -> Iterator[str | int]:
        if text := _content(self._tokenizer.get(f"{which}_token")):
            yield text
        for file in self._files:
            yield from _several(file.get(f"{which}_token_id"))

    def adds_bos(self) -> bool | None:
        said = self._tokenizer.get("add_bos_token")
        return said if isinstance(said, bool) else None

    def texts(self) -> tuple[str, str]:
        """Of the beginning and the end token, as templates name them."""
        return _content(self._tokenizer.get("bos_token")), _content(self._tokenizer.get("eos_token"))

    def template(self) -> str:
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = self._tokenizer.get("chat_template") or _read(self._folder / "chat_template.json").get(
            "chat_template"
        )
        if isinstance(found, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in found}
            found = named.get("default") or next(iter(named.values()), "")
        return found if isinstance(found, str) else ""


class _Spelling:
    """How the vocabulary spells bytes: as printable characters (GPT-2), or as text with ▁ for a space and <0x0A>
    for a byte (SentencePiece). `prefix`: a space is put before every text."""

    def __init__(self, *, byte_level: bool, prefix: bool) -> None:
        self._byte_level = byte_level
        self.prefix = prefix

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> _Spelling:
        decoder = _mapping(tokenizer.get("decoder"))
        steps = decoder.get("decoders") or [decoder]
        kinds = {step.get("type") for step in steps}
        strips = any(step.get("type") == "Strip" and step.get("start") for step in steps)
        puts = any(
            step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
            for step in steps
        )
        return cls(byte_level="ByteLevel" in kinds, prefix=strips or puts)

    def bytes(self, text: str) -> bytes:
        if self._byte_level:
            return bytes(_BYTES[c] for c in text) if all(c in _BYTES for c in text) else text.encode()
        if byte := _BYTE.fullmatch(text):
            return bytes([int(byte[1], 16)])
        return text.replace(_SPACE, " ").encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the others for 256 and on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_characters()


def _read(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModelFile(f"{path} is not usable: {error}", hint="Export it again.") from error
    return _mapping(data)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _several(value: Any) -> list[int]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)]


def _content(token: Any) -> str:
    """The text of a token, which tokenizer_config.json has as a string or an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""
