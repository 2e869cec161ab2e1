"""Every error that alight raises on purpose.

    AlightError                   what happened, the value, and what to do next
    ├── BadInput                  an argument, option or file content that cannot be used
    │   ├── InvalidModelFile      a GGUF, config or manifest that is truncated, lying or of another kind
    │   ├── ContextExceeded       more tokens than the loaded context holds
    │   └── Unsupported           a real feature, but not of this model or target
    ├── ModelNotFound             no model of that name here (with the nearest names)
    ├── DeviceNotFound            no such device profile, or no such peer on the network
    ├── StoreError                the model store could not do it
    │   ├── DigestMismatch        bytes are not what their digest says
    │   └── DiskFull              no room left on the device
    ├── SourceError               a model could not be fetched
    │   └── NetworkError          the host could not be reached or hung up
    ├── MissingExtra              an optional package is needed; names the install command
    ├── TargetUnavailable         the runtime is not here; says how it would be
    ├── DoesNotFit                the model needs more memory than there is, with the numbers
    ├── EngineError               the runtime failed while loading or running
    │   └── EngineCrashed         the process that ran the model is gone
    ├── Busy                      too many requests wait already; says when to come back
    └── RemoteError               a peer answered with an error

Each message is one or two lines. `hint` is the part that says what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlightError(Exception):
    """Base of every error a user can cause.

    Args:
        message: what happened, with the value that caused it.
        hint: what to do next; printed after the message.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class BadInput(AlightError, ValueError):
    """An argument, option or file content that cannot be used."""


class InvalidModelFile(BadInput):
    """A GGUF, config or manifest that is truncated, lies about itself, or is of another kind."""


class ContextExceeded(BadInput):
    """More tokens than the loaded context holds."""

    def __init__(self, needed: int, context: int) -> None:
        super().__init__(
            f"the request needs {needed} tokens but the context holds {context}",
            hint="Shorten the prompt, ask for fewer tokens, or load the model with a larger context.",
        )
        self.needed = needed
        self.context = context


class Unsupported(BadInput):
    """A real feature, but not of this model or target."""


class ModelNotFound(AlightError, LookupError):
    """No model of that name here.

    Args:
        name: the name asked for.
        known: the names that exist; the nearest ones are suggested.
    """

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        known = list(known)
        near = nearest(name, known)
        if near:
            hint = f"Did you mean {' or '.join(near)}? `alight list` shows what is here."
        else:
            hint = "`alight list` shows what is here; `alight pull SOURCE` fetches a model."
        super().__init__(f"no model named {name!r}", hint=hint)
        self.name = name


class DeviceNotFound(AlightError, LookupError):
    """No such device profile, or no such peer on the network."""


class StoreError(AlightError):
    """The model store could not do what was asked."""


class DigestMismatch(StoreError):
    """Bytes are not what their digest says."""


class DiskFull(StoreError):
    """No room left on the device."""

    def __init__(self, path: object, needed: int | None = None, free: int | None = None) -> None:
        numbers = ""
        if needed is not None and free is not None:
            numbers = f": {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
        super().__init__(
            f"the disk of {path} is full{numbers}",
            hint="Free some space (`alight rm NAME`) or set ALIGHT_HOME to another disk. What was there is intact.",
        )


class SourceError(AlightError):
    """A model could not be fetched from its source."""


class NetworkError(SourceError):
    """The host could not be reached, or hung up."""


class MissingExtra(AlightError, ImportError):
    """An optional part of alight is not installed.

    Args:
        what: what needs it, for example "serving".
        extra: the extra of the alight distribution that brings it.
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the `{extra}` extra", hint=f"Run: pip install 'alight[{extra}]'")
        self.extra = extra


class TargetUnavailable(AlightError):
    """The runtime is not on this machine; the hint is the command that would bring it."""


class DoesNotFit(AlightError):
    """The model needs more memory than there is.

    Args:
        what: the model and the settings.
        needed: bytes predicted.
        available: bytes free.
    """

    def __init__(self, what: str, needed: int, available: int, hint: str = "") -> None:
        super().__init__(
            f"{what} needs about {needed / 1e6:,.0f} MB but {available / 1e6:,.0f} MB are free",
            hint=hint
            or "Use a smaller context, a smaller artifact (`alight build … --for …`), or free memory.",
        )
        self.needed = needed
        self.available = available


class EngineError(AlightError):
    """The runtime failed while loading or running a model."""


class EngineCrashed(EngineError):
    """The process that ran the model ended by itself, or was killed.

    Args:
        retry_after: seconds until it is started again; 0 if the next request does that.
    """

    def __init__(self, message: str, *, hint: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class Busy(AlightError):
    """Too many requests wait for a model already.

    Args:
        retry_after: seconds after which there is probably room.
    """

    def __init__(self, message: str, *, hint: str = "", retry_after: float = 1.0) -> None:
        super().__init__(message, hint=hint or f"Try again in {retry_after:.0f} seconds.")
        self.retry_after = retry_after


class RemoteError(AlightError):
    """A peer answered with an error."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first."""
    by_fold = {k.casefold(): k for k in known}
    found = difflib.get_close_matches(name.casefold(), by_fold, n=count, cutoff=0.5)
    return [by_fold[f] for f in found]
