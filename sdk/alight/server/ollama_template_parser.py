"""Go's text/template, parsed: texts, expressions and blocks. See https://pkg.go.dev/text/template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TypeAlias

from alight.server.failures import Refused


@dataclass(frozen=True, slots=True)
class Literal:
    value: str | float | bool | None


@dataclass(frozen=True, slots=True)
class Field:
    """`.A.B`, or `(expression).A.B`. An empty path is the dot itself."""

    path: tuple[str, ...]
    of: Expression | None = None


@dataclass(frozen=True, slots=True)
class Variable:
    """`$name.A.B`; without a name it is `$`, the outermost dot."""

    name: str
    path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: tuple[Expression, ...]


@dataclass(slots=True)
class Block:
    """`if`, `with`, `range`, `set` (an assignment), `break` or `continue`."""

    kind: str
    subject: Expression | None = None
    key: str = ""  # the variables that range or with declare, or that is set
    value: str = ""
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


Expression: TypeAlias = Literal | Field | Variable | Call
Node: TypeAlias = str | Expression | Block

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>"(?:\\.|[^"\\\n])*"|`[^`]*`)
    | (?P<number>-?\d+(?:\.\d+)?)
    | (?P<path>(?:\.[A-Za-z_]\w*)+)
    | (?P<variable>\$\w*)
    | (?P<name>[A-Za-z_]\w*)
    | (?P<sign>:=|=|\||\(|\)|,|\.)
    )""",
    re.VERBOSE,
)
_CONSTANTS = {"true": True, "false": False, "nil": None}
_SPACE = " \t\r\n"


def parse(template: str) -> list[Node]:
    """The nodes of a template.

    Raises:
        Refused: 400, it is malformed or uses what we do not know.
    """
    return _Parser(template).parse()


class _Parser:
    def __init__(self, template: str) -> None:
        self._pieces = _pieces(template)
        self._at = 0

    def parse(self) -> list[Node]:
        nodes, end = self._nodes()
        if end is not None:
            raise _error(f"{{{{ {end} }}}} has no beginning")
        return nodes

    def _nodes(self) -> tuple[list[Node], str | None]:
        """Nodes up to an `end` or `else`, which is returned, or up to the end of the template."""
        nodes: list[Node] = []
        while self._at < len(self._pieces):
            is_action, piece = self._pieces[self._at]
            self._at += 1
            if not is_action:
                nodes.append(piece)
                continue
            word, _, rest = piece.partition(" ")
            if word in ("end", "else"):
                return nodes, piece
            if word in ("if", "with", "range"):
                nodes.append(self._block(word, rest))
            elif word in ("break", "continue"):
                nodes.append(Block(word))
            elif word in ("define", "template", "block"):
                raise _error(f"{{{{ {word} }}}} is not known here")
            else:
                nodes.append(_action(piece))
        return nodes, None

    def _block(self, kind: str, header: str) -> Block:
        names, subject = _declaration(_tokens(header))
        if len(names) > (2 if kind == "range" else 1):
            raise _error(f"{{{{ {kind} {header} }}}} declares too many variables")
        key, value = ["", "", *names][-2:]
        block = Block(kind, subject, key, value)
        if kind == "if" and names:
            raise _error(f"{{{{ if {header} }}}} declares a variable")
        block.body, end = self._nodes()
        if end is not None and end != "end":
            word, _, rest = end.removeprefix("else").strip().partition(" ")
            if word in ("if", "with"):  # {{ else if }} closes with the same {{ end }}
                block.otherwise = [self._block(word, rest)]
                return block
            block.otherwise, end = self._nodes()
        if end != "end":
            raise _error(f"{{{{ {kind} {header} }}}} has no {{{{ end }}}}")
        return block


def _pieces(template: str) -> list[tuple[bool, str]]:
    """The texts and the actions, (False, text) and (True, what is between the braces), trimmed."""
    pieces: list[tuple[bool, str]] = []
    at, trim = 0, False
    while True:
        start = template.find("{{", at)
        text = template[at:] if start < 0 else template[at:start]
        text = text.lstrip(_SPACE) if trim else text
        if start < 0:
            return [*pieces, (False, text)] if text else pieces
        begin = start + 2
        if re.match(r"-\s", template[begin:]):
            text, begin = text.rstrip(_SPACE), begin + 1
        if text:
            pieces.append((False, text))
        end = _end_of_action(template, begin)
        inside = template[begin:end]
        trim = bool(re.search(r"\s-$", inside))
        inside = (inside[:-1] if trim else inside).strip()
        if not inside.startswith("/*"):
            pieces.append((True, re.sub(r"^(\w+)\s+", r"\1 ", inside)))
        at = end + 2


def _end_of_action(template: str, at: int) -> int:
    """Where the braces close; not those inside a text."""
    for match in re.compile(r'"(?:\\.|[^"\\\n])*"|`[^`]*`|/\*.*?\*/|\}\}', re.DOTALL).finditer(template, at):
        if match[0] == "}}":
            return match.start()
    raise _error("a {{ is not closed")


def _action(piece: str) -> Node:
    tokens = _tokens(piece)
    names, subject = _declaration(tokens)
    if names:
        if len(names) > 1:
            raise _error(f"{{{{ {piece} }}}} sets two variables")
        return Block("set", subject, value=names[0])
    return subject


_Tokens: TypeAlias = list[tuple[str, str, bool]]  # kind, text, whether white space comes before it


def _tokens(text: str) -> _Tokens:
    tokens: _Tokens = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise _error(f"{text[at:].strip()!r} cannot be read")
        word = match[match.lastgroup]
        tokens.append((match.lastgroup, word, match.end() - match.start() > len(word)))
        at = match.end()
    return tokens


def _declaration(tokens: _Tokens) -> tuple[list[str], Expression]:
    """`$a, $b := pipeline`: the names, and the pipeline."""
    sign = next((i for i, (_, text, _) in enumerate(tokens) if text in (":=", "=")), -1)
    names = [text[1:] or "_" for kind, text, _ in tokens[: max(sign, 0)] if kind == "variable"]
    reader = _Reader(tokens[sign + 1 :])
    expression = reader.pipeline()
    if reader.left():
        raise _error(f"{reader.left()!r} is not expected there")
    return names, expression


class _Reader:
    """Reads an expression off its tokens."""

    def __init__(self, tokens: _Tokens) -> None:
        self._tokens = tokens
        self._at = 0

    def left(self) -> str:
        return " ".join(text for _, text, _ in self._tokens[self._at :])

    def pipeline(self) -> Expression:
        """`a b | c d`: what is before the bar is the last argument of what is after it."""
        value = self._command(None)
        while self._peek() == "|":
            self._at += 1
            value = self._command(value)
        return value

    def _command(self, piped: Expression | None) -> Expression:
        kind, text = self._kind(), self._peek()
        if kind == "name" and text not in _CONSTANTS:
            self._at += 1
            arguments = []
            while self._peek() not in ("", "|", ")"):
                arguments.append(self._operand())
            return Call(text, (*arguments, piped) if piped is not None else tuple(arguments))
        if piped is not None:
            raise _error(f"{text!r} is no function")
        return self._operand()

    def _operand(self) -> Expression:
        kind, text = self._kind(), self._peek()
        self._at += 1
        match kind:
            case "string":
                return Literal(text[1:-1] if text[0] == "`" else _unquoted(text))
            case "number":
                return Literal(float(text) if "." in text else int(text))
            case "path":
                return Field(tuple(text[1:].split(".")))
            case "variable":
                return Variable(text[1:], self._joined_path())
            case "name" if text in _CONSTANTS:
                return Literal(_CONSTANTS[text])
            case "name":
                return Call(text, ())
            case "sign" if text == ".":
                return Field(())
            case "sign" if text == "(":
                inner = self.pipeline()
                if self._peek() != ")":
                    raise _error("a ( is not closed")
                self._at += 1
                path = self._joined_path()
                return Field(path, inner) if path else inner
        raise _error(f"{text!r} is not expected there" if text else "a value is missing")

    def _joined_path(self) -> tuple[str, ...]:
        """The fields that follow without a space, as in `$a.B`."""
        if self._kind() == "path" and not self._tokens[self._at][2]:
            self._at += 1
            return tuple(self._tokens[self._at - 1][1][1:].split("."))
        return ()

    def _kind(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def _peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))  # Go's escapes that people use are JSON's
    except ValueError:
        raise _error(f"the text {text} cannot be read") from None


def _error(what: str) -> Refused:
    return Refused(400, f"template error: {what}", param="template")
