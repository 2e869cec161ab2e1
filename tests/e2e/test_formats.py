"""ONNX and MLC artifacts of the real SmolLM2: built, kept, loaded, compared with GGUF, in the report and the verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alight import api, plugins
from alight.cli import application
from alight.folders import folder_of
from alight.store import Store

TEXT = "A short walk in the park is good for the heart, and a long one is better. Dogs know this well. " * 6
FORMATS = {"onnx": "int4-b32", "mlc": "q4f32_1", "gguf": "q4_0"}


def alight(*words: str) -> str:
    done = CliRunner().invoke(application(), list(words))
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one artifact of each format; what the build printed is in it, too."""
    missing = [
        f for f in FORMATS if not any(f in t.formats and t.automatic for t in plugins.targets().values())
    ]
    if missing:
        pytest.skip(f"nothing here reads {', '.join(missing)}")
    home = tmp_path_factory.mktemp("home")
    text = home / "text.txt"
    text.write_text(TEXT)
    kinds = [word for kind in FORMATS.values() for word in ("--quant", kind)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGHT_HOME", str(home))
        words = ["build", "builtin:smollm2", "--format", ",".join(FORMATS), *kinds, "-o", "small"]
        limits = ["--text", str(text), "--tokens", "128", "--context", "512", "--dir", str(home / "out")]
        (home / "printed.txt").write_text(alight(*words, *limits))
    return home


@pytest.fixture
def store(built: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("ALIGHT_HOME", str(built))
    return Store()


def test_one_lineage_in_one_report(store: Store, built: Path) -> None:
    artifacts = [store.get(f"small:{kind}") for kind in FORMATS.values()]
    assert [a.format for a in artifacts] == list(FORMATS)
    assert len({a.lineage for a in artifacts} | {store.get("smollm2").lineage}) == 1
    for artifact in artifacts:
        report = artifact.report
        assert report is not None
        found = {c["format"]: c for c in report["candidates"]}
        assert set(found) == set(FORMATS)
        for candidate in found.values():
            assert 0.01 < candidate["quality"]["kl_mean"] < 1
            assert candidate["speed"]["decode"] > 0
            assert candidate["memory_bytes"] > candidate["size"] / 2
        assert all(len(sample["artifact"]) > 0 for sample in report["samples"])
    printed = (built / "printed.txt").read_text()
    assert max(map(len, printed.split("chosen:")[0].splitlines())) <= 80
    assert all(f"{a.format} {a.description.quantization}" in printed for a in artifacts)


def test_the_verbs_take_a_name_and_a_folder(store: Store, built: Path) -> None:
    assert store.verify() == []
    for name, kind in FORMATS.items():
        about: dict[str, Any] = json.loads(alight("show", f"small:{kind}", "--json"))
        assert (about["format"], about["layers"], about["parameters"] > 130e6) == (name, 30, True)
        assert alight("run", f"small:{kind}", "The capital of France is", "--max-tokens", "4").strip()
    for name, kind in (("onnx", "int4-b32"), ("mlc", "q4f32_1")):
        folder = built / "out" / f"small-{kind}"
        assert {p.name for p in folder.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
        assert alight("run", str(folder), "The capital of France is", "--max-tokens", "4").strip()
        speed = json.loads(
            alight("bench", f"small:{kind}", "--prompt", "32", "--new", "8", "--rounds", "1", "--json")
        )
        assert speed["target"] == name


def test_another_format_is_measured_against_a_gguf(store: Store, built: Path) -> None:
    words = ["eval", "small:int4-b32", "--against", "small:q4_0", "--text", str(built / "text.txt"), "--json"]
    assert 0 < json.loads(alight(*words))["kl_mean"] < 1


def test_an_exported_folder_comes_into_the_store_and_goes(store: Store, built: Path) -> None:
    pulled = api.pull(str(built / "out/small-q4f32_1"), name="pulled")
    with api.load("pulled", context=128) as model:
        assert model.complete("The capital of France is", max_tokens=8, temperature=0).text
    folder = folder_of(pulled)
    assert folder.is_relative_to(store.root)
    assert (folder / "mlc-chat-config.json").stat().st_nlink > 1
    store.remove("pulled")
    assert not folder.exists()
