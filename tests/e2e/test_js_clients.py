"""The official JavaScript clients, npm's `ollama` and `openai`, against a real server with the real SmolLM2."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from alight import api
from alight.artifact import digest_of
from alight.server import Models, running
from alight.store import Store
from alight.target import LoadOptions

JS = Path(__file__).parent / "js"
TESTS = [
    (file.name, name)
    for file in (JS / "ollama.mjs", JS / "openai.mjs")
    for name in re.findall(r"^export async function (\w+)", file.read_text(), re.MULTILINE)
]


@pytest.fixture(scope="module")
def packages(request: pytest.FixtureRequest) -> Path:
    """A folder with the tests and the packages that the lock file names; installed once for each such file."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    cache = request.config.cache
    assert cache
    folder = cache.mkdir("js-clients")
    wanted = digest_of((JS / "package.json").read_bytes() + (JS / "package-lock.json").read_bytes())
    for file in JS.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    installed = folder / "installed"
    if not installed.exists() or installed.read_text() != wanted:
        done = subprocess.run(
            [npm, "ci", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        installed.write_text(wanted)
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = Store(tmp_path_factory.mktemp("store"))
    api.pull("builtin:smollm2", store=store)
    with Models(store, LoadOptions(context=1024, threads=1)) as models, running(models) as url:
        yield url


@pytest.mark.parametrize(
    ("file", "name"), TESTS, ids=[f"{file.split('.')[0]}-{name}" for file, name in TESTS]
)
def test_js(packages: Path, url: str, file: str, name: str) -> None:
    done = subprocess.run(
        ["node", "run.mjs", file, name],
        cwd=packages,
        env={**os.environ, "ALIGHT_URL": url, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_all_tests_are_found() -> None:
    assert ("ollama.mjs", "abort") in TESTS and ("openai.mjs", "abort") in TESTS
