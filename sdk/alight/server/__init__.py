"""The micro-server: models behind the OpenAI and Ollama HTTP APIs.

    from alight.server import Models, running

    with Models(Store()) as models, running(models) as url:
        ...  # any OpenAI or Ollama client can use `url`

`serve` runs it in the foreground, `running` in a thread, `create_app` gives the ASGI application alone.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from alight.errors import MissingExtra

if TYPE_CHECKING:
    from alight.server.app import create_app
    from alight.server.manager import Models
    from alight.server.offers import Offer
    from alight.server.run import running, serve

if not all(map(find_spec, ("fastapi", "prometheus_client", "uvicorn"))):
    raise MissingExtra("the server", "serve")

__all__ = ["Models", "Offer", "create_app", "running", "serve"]

_HOMES = {"Models": "manager", "Offer": "offers", "create_app": "app", "running": "run", "serve": "run"}


def __getattr__(name: str) -> Any:
    # Imported when asked for: a worker process is in this package too, and needs no web framework.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
