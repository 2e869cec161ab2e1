"""What the verbs share: the consoles, errors, tables, sizes, progress bars and JSON.

Results go to standard output and everything else to standard error, so that output can be piped.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from alight.errors import AlightError
from alight.store import Store

Progress = Callable[[str, int, int], None]  # what, done, in all (0: unknown)

console = Console(highlight=False)
err = Console(stderr=True, highlight=False)

log = logging.getLogger(__name__)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]


def complete_model(incomplete: str) -> list[str]:
    """The models of the store that begin so: for the shell's completion, which must never fail."""
    try:
        return [m.name for m in Store().artifacts() if m.name.startswith(incomplete)]
    except AlightError:
        return []


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A plain table without lines. The first column may be folded, the others stay whole."""
    plain = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        plain.add_column(
            name,
            justify="right" if name in right else "left",
            overflow="fold",
            no_wrap=number > 0,
        )
    return plain


def print_facts(facts: Mapping[str, str]) -> None:
    """Names and values, one a line; empty values are left out. Long ones stay whole, to be copied."""
    told = {name: value for name, value in facts.items() if value}
    width = max(map(len, told), default=0)
    for name, value in told.items():
        console.print(Text.assemble((name.ljust(width), "bold"), "  ", value), soft_wrap=True)


def human_bytes(count: float) -> str:
    """1_234_567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"


def human_count(count: float) -> str:
    """135_000_000 -> "135M"."""
    for unit in ("", "K", "M", "B"):
        if count < 999.5 or unit == "B":
            break
        count /= 1000
    return f"{count:.1f}{unit}" if unit == "B" else f"{count:.0f}{unit}"


def human_time(seconds: float) -> str:
    """Seconds since the epoch, as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


# -- what went wrong -------------------------------------------------------------------------------


def say_error(error: AlightError) -> None:
    """The message, and what to do next."""
    err.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
    if error.hint:
        err.print(Text(error.hint), soft_wrap=True)


def say_warning(text: str) -> None:
    err.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def say_bug(error: BaseException) -> None:
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    line = f"{what}. This is a bug in alight: run it with `alight --debug …` and report what that prints."
    err.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def never_fail_on_characters() -> None:
    """A terminal that cannot show a character gets an escape for it, not an error in our program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _LogHandler(logging.Handler):
    """Log lines by way of rich, so that they do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            line = Text(f"{record.levelname.lower()}: {self.format(record)}")
            err.print(line, style="yellow" if record.levelno >= logging.WARNING else "dim", soft_wrap=True)


def log_to_terminal(*, debug: bool) -> None:
    """Warnings of every library; everything of alight's with `debug`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_LogHandler()])
    logging.getLogger("alight").setLevel(logging.DEBUG if debug else logging.WARNING)
    if not debug:
        logging.getLogger("zeroconf").setLevel(logging.ERROR)  # it warns about other devices' packets


# -- progress --------------------------------------------------------------------------------------


@contextmanager
def progress(*, steps: bool = False) -> Iterator[Progress]:
    """Gives a callback `(what, done, total)` that draws a bar for each `what`: size, speed and time left.

    What stands after ": " in `what` may change: it is told beside the same bar, such as the loss of a training.
    Where standard error is no terminal, it logs instead (level INFO). `steps` counts steps, not bytes.
    """
    if not err.is_terminal:
        yield _Milestones()
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    figures: list[ProgressColumn] = (
        [MofNCompleteColumn()] if steps else [DownloadColumn(), TransferSpeedColumn()]
    )
    tasks: dict[str, TaskID] = {}
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        *figures,
        TimeRemainingColumn(compact=True),
        console=err,
        transient=True,
    ) as bars:

        def report(what: str, done: int, total: int) -> None:
            work, colon, figures = what.partition(": ")
            label = escape(_middle(work, 24) + colon + figures)
            if work not in tasks:
                tasks[work] = bars.add_task(label, total=total or None)
            bars.update(tasks[work], description=label, completed=done, total=total or None)

        yield report


class _Milestones:
    """Logs each quarter of the way."""

    def __init__(self) -> None:
        self._reached: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        quarter = 4 * done // total if total else 0
        work = what.partition(": ")[0]
        if quarter > self._reached.get(work, -1):
            self._reached[work] = quarter
            log.info("%s: %d of %s", what, done, total or "?")


def _middle(text: str, width: int) -> str:
    """Shortened in the middle: file names differ at their ends."""
    if len(text) <= width:
        return text
    keep = width - 1
    return f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}"
