"""alight's server, with this page and an MLC artifact beside its API.

python examples/web/serve.py ARTIFACT [--port 8080]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import uvicorn
from fastapi.staticfiles import StaticFiles

from alight import api
from alight.folders import folder_of
from alight.server.app import create_app
from alight.server.manager import Models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "artifact", help="a name of the store, or a folder that `alight build --format mlc` wrote"
    )
    parser.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args()
    folder = folder_of(api.resolve(arguments.artifact))
    app = create_app(Models(), name="alight")
    app.mount("/web/artifact/resolve/main", StaticFiles(directory=folder))
    app.mount("/web", StaticFiles(directory=Path(__file__).parent, html=True))
    print(f"http://127.0.0.1:{arguments.port}/web/")
    uvicorn.run(app, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
