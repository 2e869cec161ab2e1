"""A chat with a model in the terminal: `alight run NAME`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from types import FrameType
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.text import Text

from alight import paths
from alight.cli.answer import print_answer, usage_line
from alight.cli.output import console, print_facts, say_error
from alight.errors import AlightError, BadInput, nearest
from alight.preset import Preset
from alight.target import Chunk, Model, Sampling

FENCE = '"""'

HELP = {
    "/help": "this list",
    "/clear": "forget the conversation",
    "/set": "how answers are chosen: /set temperature 0.2; without a value, the default",
    "/system": "instructions for the whole conversation: /system Answer in French.",
    "/show": "the model and the settings",
    "/exit": "leave (so does Ctrl-D)",
}


class Conversation:
    """What was said so far, and the loop that reads, answers and obeys commands."""

    def __init__(self, model: Model, *, preset: Preset, sampling: dict[str, Any], stats: bool) -> None:
        self.model = model
        self.preset = preset
        self.sampling = sampling
        self.stats = stats
        self.messages: list[dict[str, str]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/set": self._set,
            "/system": self._system,
            "/show": self._show,
        }

    def run(self) -> None:
        """Until /exit or Ctrl-D."""
        console.print(Text(f"{self.model.info.name}: /help for help, Ctrl-D to leave"), style="dim")
        session: PromptSession[str] = PromptSession(
            history=_history(),
            key_bindings=_keys(),
            multiline=True,
            completer=WordCompleter([*HELP], sentence=True),
            complete_while_typing=False,
        )
        while True:
            try:
                text = session.prompt(">>> ", prompt_continuation="... ")
            except KeyboardInterrupt:  # clears the line, as in a shell
                continue
            except EOFError:
                return
            text = text.strip().removeprefix(FENCE).removesuffix(FENCE).strip()
            if text == "/exit":
                return
            try:
                if text.startswith("/"):
                    self._obey(text)
                elif text:
                    self._answer(text)
            except KeyboardInterrupt:  # a second one, while an answer did not stop at the first
                console.print("(stopped)", style="dim")
            except AlightError as error:
                say_error(error)

    def _answer(self, text: str) -> None:
        asked = [*self.messages, {"role": "user", "content": text}]
        with (
            _ctrl_c() as stopped,
            closing(self.model.chat(self.preset.apply_to(asked), stream=True, **self.sampling)) as chunks,
        ):
            answer = print_answer(_until(stopped, chunks))
        if stopped.is_set():
            console.print("(stopped)", style="dim")
        else:
            usage = answer.usage
            line = usage_line(usage) if self.stats else f"{usage.tokens_per_second:.1f} tok/s"
            console.print(line, style="dim")
        if answer.text:  # also of one that was stopped: people refer to it
            self.messages = [*asked, {"role": "assistant", "content": answer.text}]

    def _obey(self, text: str) -> None:
        verb, _, rest = text.partition(" ")
        command = self._commands.get(verb)
        if command is None:
            near = nearest(verb, HELP)
            hint = f"Did you mean {' or '.join(near)}?" if near else "/help lists the commands."
            raise BadInput(f"unknown command {verb}", hint=hint)
        command(rest.strip())

    def _help(self, _: str) -> None:
        print_facts(HELP)
        console.print(f"Alt-Enter begins a new line; between {FENCE} and {FENCE}, Enter does.", style="dim")
        console.print("Ctrl-C stops an answer.", style="dim")

    def _clear(self, _: str) -> None:
        self.messages = []
        console.print("forgotten", style="dim")

    def _system(self, text: str) -> None:
        self.preset = replace(self.preset, system=text)
        console.print("set" if text else "no instructions now", style="dim")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name not in _DEFAULTS:
            raise BadInput(f"unknown setting {name!r}", hint=f"Known: {', '.join(_DEFAULTS)}.")
        wanted = {k: v for k, v in self.sampling.items() if k != name}
        if value:
            wanted[name] = _parsed(name, value.strip())
        Sampling.of(**wanted)  # refuses what is out of range
        self.sampling = wanted
        console.print(Text(f"{name} = {wanted.get(name, _DEFAULTS[name])}"), style="dim")

    def _show(self, _: str) -> None:
        info = self.model.info
        print_facts(
            {
                "model": info.name,
                "target": info.target,
                "context": f"{info.context} tokens",
                "messages": str(len(self.messages)),
                "system": self.preset.system,
                **{name: str(self.sampling.get(name, default)) for name, default in _DEFAULTS.items()},
            }
        )


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Sampling)}
_WHOLE = {f.name for f in fields(Sampling) if "int" in str(f.type)}


def _parsed(name: str, text: str) -> str | float:
    """The value of a setting, from what was typed."""
    if name == "stop":
        return text
    try:
        return int(text) if name in _WHOLE else float(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE else "a number"
        raise BadInput(f"{name} is {text!r}", hint=f"It must be {kind}.") from None


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """While the block lasts, the first Ctrl-C only sets the event, so that no engine is torn out of its work.

    The second one is a KeyboardInterrupt.
    """
    pressed = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _until(stopped: threading.Event, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        yield chunk
        if stopped.is_set():
            return


def _history() -> History:
    """What was typed in earlier chats; for this user's eyes only."""
    file = paths.home() / "history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text.count(FENCE) == 1:
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
