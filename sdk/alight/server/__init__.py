"""The micro-server: models behind the OpenAI and Ollama HTTP APIs.

    from alight.server import Models, running

    with Models(Store()) as models, running(models) as url:
        ...  # any OpenAI or Ollama client can use `url`

`serve` runs it in the foreground, `running` in a thread, `create_app` gives the ASGI application alone.
"""

from __future__ import annotations

from alight.errors import MissingExtra

try:
    import fastapi as _fastapi  # noqa: F401
    import uvicorn as _uvicorn  # noqa: F401
except ImportError as error:
    raise MissingExtra("the server", "serve") from error

from alight.server.app import create_app
from alight.server.models import Models, Offer
from alight.server.run import running, serve

__all__ = ["Models", "Offer", "create_app", "running", "serve"]
