"""The public face of the package, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import alight

HEAVY = (
    "fastapi",
    "uvicorn",
    "torch",
    "transformers",
    "onnx",
    "llama_cpp",
    "numpy",
    "pydantic",
    "httpx",
    "zeroconf",
)


def test_import_loads_no_engine_and_no_framework() -> None:
    code = f"import sys, alight; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_same_guard_notices_an_import() -> None:
    code = f"import sys, numpy, alight; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['numpy']"


def test_public_names() -> None:
    assert list(alight.__all__) == sorted(alight.__all__)
    assert len(alight.__all__) < 20
    for name in alight.__all__:
        thing = getattr(alight, name)
        assert thing.__doc__, f"{name} has no docstring"
        assert thing.__module__.startswith("alight"), name


def test_every_error_is_in_the_drawn_tree() -> None:
    from alight import errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.AlightError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert kind.__name__ in (errors.__doc__ or ""), f"{kind.__name__} is missing in the tree"
