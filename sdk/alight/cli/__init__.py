"""The `alight` command. Each verb is a module with a function `command`."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated

import typer

from alight import __version__
from alight.cli import output
from alight.errors import AlightError

# Panel of `alight --help` -> verb -> its module. The modules import no engine and no web framework at their
# top, so that the help is quick.
VERBS = {
    "Use models": {"run": "run", "serve": "serve", "ps": "ps", "stop": "stop", "demo": "demo"},
    "Keep models": {"pull": "pull", "list": "list", "show": "show", "rm": "rm", "verify": "verify"},
    "Fit models to devices": {
        "build": "build",
        "report": "report",
        "eval": "evaluate",
        "bench": "bench",
        "probe": "probe",
    },
    "Find devices": {"devices": "devices"},
}


def application() -> typer.Typer:
    """The command line with every verb whose module is there."""
    app = typer.Typer(
        name="alight",
        help="Land any language model on any device.",
        epilog="Start with: alight run builtin:smollm2",
        pretty_exceptions_enable=False,  # main() says what went wrong
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_start)
    for panel, verbs in VERBS.items():
        for verb, name in verbs.items():
            module = f"{__name__}.{name}"
            try:
                command = importlib.import_module(module).command
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
                continue  # this installation is without that verb
            app.command(verb, rich_help_panel=panel)(command)
    return app


def main() -> None:
    """Run the command line. Ends with exit code 0 (done), 1 (an error), 2 (bad usage) or 130 (Ctrl-C)."""
    output.never_fail_on_characters()
    try:
        try:
            application()(prog_name="alight")
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        if end.code == 130:
            output.err.print("interrupted")
        raise
    except KeyboardInterrupt:
        output.err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has enough. Without this, Python would complain when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except AlightError as error:
        if _debugging():
            traceback.print_exc()
        output.say_error(error)
        sys.exit(1)
    except OSError as error:
        if _debugging():
            raise
        output.say_error(AlightError(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")))
        sys.exit(1)
    except Exception as error:
        if _debugging():
            raise
        output.say_bug(error)
        sys.exit(1)


def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log everything; keep tracebacks.")] = False,
) -> None:
    if debug:
        os.environ["ALIGHT_DEBUG"] = "1"  # child processes see it, too
    output.log_to_terminal(debug=_debugging())
    if version:
        output.console.print(f"alight {__version__}")
    elif context.invoked_subcommand is None:
        output.console.print(context.get_help())


def _debugging() -> bool:
    return os.environ.get("ALIGHT_DEBUG", "") not in ("", "0")
