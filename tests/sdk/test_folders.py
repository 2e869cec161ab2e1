"""ONNX and MLC folders: as they lie, in the store, and laid out again for a runtime."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from export_folders import MLC_CHAT, mlc_folder, onnx_folder
from typer.testing import CliRunner

from alight import api, folders, plugins
from alight.artifact import CODE, WEIGHT, WEIGHT_CONFIG, Artifact, Description, is_exported
from alight.cli import application
from alight.errors import InvalidModelFile, StoreError, TargetUnavailable
from alight.folders import folder_of
from alight.server import memory
from alight.store import Store
from alight.target import Availability, LoadOptions
from alight.testing import EchoTarget


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


@pytest.fixture
def stored(store: Store, tmp_path: Path) -> Artifact:
    return api.pull(str(mlc_folder(tmp_path / "mlc")), name="m", store=store)


def test_an_onnx_folder_as_it_lies(tmp_path: Path) -> None:
    artifact = Artifact.loose(onnx_folder(tmp_path / "My-Model"))
    assert (artifact.name, artifact.format, artifact.description.architecture) == (
        "my-model",
        "onnx",
        "llama",
    )
    assert [p.name for p in artifact.weights] == ["model.onnx", "model.onnx.data"]
    assert folder_of(artifact) == tmp_path / "My-Model"


def test_an_mlc_folder_as_it_lies(tmp_path: Path) -> None:
    artifact = Artifact.loose(mlc_folder(tmp_path / "m"))
    about = artifact.description
    assert (about.format, about.quantization, about.parameters) == ("mlc", "q4f32_1", 10_000)
    kinds = {x.path: x.media_type for x in artifact.layers}
    assert kinds["params_shard_0.bin"] == WEIGHT
    assert kinds["lib/x86_64.so"] == CODE
    assert kinds["lib/libraries.json"] == WEIGHT_CONFIG
    assert folder_of(artifact) == tmp_path / "m"


def test_a_gguf_has_a_folder_too(tmp_path: Path) -> None:
    file = tmp_path / "f/model.gguf"
    artifact = Artifact("m", "", Description("gguf"), (), {"model.gguf": file})
    assert folder_of(artifact) == tmp_path / "f"


def test_hidden_files_are_no_part_of_a_model(tmp_path: Path) -> None:
    folder = onnx_folder(tmp_path / "m")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("x")
    assert not [path for path in Artifact.loose(folder).files if ".git" in path]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("mlc-chat-config.json", "[1", "mlc-chat-config.json is damaged"),
        ("mlc-chat-config.json", "[]", "holds no mapping"),
        ("mlc-chat-config.json", "{}", "no 'model_config'"),
        ("tensor-cache.json", '{"metadata": {}}', "lists no weight files"),
        ("params_shard_0.bin", None, "params_shard_0.bin is missing"),
        ("tensor-cache.json", None, "tensor-cache.json is missing"),
    ],
)
def test_a_damaged_folder_is_told(tmp_path: Path, name: str, data: str | None, words: str) -> None:
    folder = mlc_folder(tmp_path / "m")
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(data)
    with pytest.raises(InvalidModelFile, match=words):
        Artifact.loose(folder)


def test_an_onnx_folder_without_its_graph_is_told(tmp_path: Path) -> None:
    folder = onnx_folder(tmp_path / "m")
    (folder / "model.onnx").unlink()
    with pytest.raises(InvalidModelFile, match=r"names model\.onnx"):
        Artifact.loose(folder)


def test_an_encoder_needs_no_genai_config(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 512}')
    artifact = Artifact.loose(tmp_path)
    assert (artifact.format, artifact.description.architecture, artifact.trained_context) == (
        "onnx",
        "bert",
        512,
    )
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert not is_exported(tmp_path), "it is a checkpoint that brings a graph along"


def test_any_other_folder_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile, match=r"genai_config\.json"):
        Artifact.loose(tmp_path)


def test_a_stored_model_is_laid_out_once(store: Store, stored: Artifact) -> None:
    folder = folder_of(stored)
    assert folder.is_relative_to(store.root)
    assert (folder / "lib/x86_64.so").stat().st_ino == stored.files["lib/x86_64.so"].stat().st_ino
    assert json.loads((folder / "mlc-chat-config.json").read_text()) == MLC_CHAT
    made = folder.stat()
    assert folder_of(stored).stat().st_ino == made.st_ino
    assert Artifact.loose(folder).description.quantization == "q4f32_1"


def test_a_folder_that_somebody_broke_is_made_again(stored: Artifact) -> None:
    folder = folder_of(stored)
    (folder / "lib/x86_64.so").unlink()
    assert (folder_of(stored) / "lib/x86_64.so").exists()


@pytest.mark.parametrize("missing", [["link"], ["link", "symlink"]])
def test_without_hard_links(stored: Artifact, missing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("no links here")

    for name in missing:
        monkeypatch.setattr(os, name, refused)
    folder = folder_of(stored)
    assert (folder / "lib/x86_64.so").read_bytes() == stored.files["lib/x86_64.so"].read_bytes()
    assert (folder / "lib/x86_64.so").is_symlink() == ("symlink" not in missing)


def test_what_a_killed_maker_left_is_not_visible_and_goes(store: Store, stored: Artifact) -> None:
    half = store.root / "folders" / ".0123456789abcdef"
    half.mkdir(parents=True)
    (half / "half").write_text("x")
    assert folder_of(stored) != half
    store.tag("m", "n")
    store.remove("n")
    assert not half.exists()
    assert folder_of(stored).exists()


def test_the_folder_goes_with_the_model(store: Store, stored: Artifact) -> None:
    folder = folder_of(stored)
    store.tag("m", "second")
    store.remove("m")
    assert folder.exists()
    assert store.remove("second") > 5000
    assert not folder.exists()
    assert not list(store.blobs.iterdir())


def test_a_missing_blob_is_told(store: Store, stored: Artifact) -> None:
    stored.files["params_shard_0.bin"].unlink()
    with pytest.raises(StoreError, match="missing"):
        folder_of(stored)
    assert not list((store.root / "folders").iterdir())


def test_many_threads_make_one_folder(stored: Artifact) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(folder_of(stored))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(list(found[0].parent.iterdir())) == 1


def test_files_in_several_places_are_no_folder(tmp_path: Path) -> None:
    files = {"a": tmp_path / "x/a", "b": tmp_path / "y/b"}
    with pytest.raises(InvalidModelFile, match="is not in"):
        folders.folder_of(Artifact("m", "", Description("onnx"), (), files))


def test_into_the_store_and_back(store: Store, tmp_path: Path) -> None:
    artifact = api.pull(str(onnx_folder(tmp_path / "onnx-model")), store=store)
    assert (artifact.name, artifact.format) == ("onnx-model", "onnx")
    assert artifact.lineage.startswith("sha256:")
    assert store.verify() == []
    assert api.resolve("onnx-model", store=store).digest == artifact.digest
    assert api.resolve(str(tmp_path / "onnx-model"), store=store).digest == ""  # not copied to be loaded


def test_what_it_takes_is_told_from_its_files(tmp_path: Path) -> None:
    artifact = Artifact.loose(mlc_folder(tmp_path / "m"))
    short, long = (memory.needed(artifact, LoadOptions(context=n)) for n in (512, 2048))
    kv = 2 * 3 * 2 * 16 * 4  # bytes of a token: keys and values, layers, heads, head width, float32
    assert long - short >= (2048 - 512) * kv
    assert memory.wished(artifact, LoadOptions(context=512), 10_000).context == 2048


@pytest.mark.parametrize("make", [onnx_folder, mlc_folder])
def test_verbs_on_it(make: Callable[[Path], Path], tmp_path: Path, home: Path) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(application(), list(words))
        assert done.exit_code == 0, done.output
        return done.stdout

    run("pull", str(make(tmp_path / "exported")), "--name", "e")
    about = json.loads(run("show", "e", "--json"))
    assert (about["layers"], about["trained_context"], about["chat_template"]) == (3, 2048, False)
    assert "tokenizer.json" in run("show", "e")
    assert about["format"] in run("list")
    folder_of(Store().get("e"))
    run("verify", "e")
    run("rm", "e")
    assert not list((home / "models/folders").iterdir())


def test_nothing_here_that_reads_it_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away(EchoTarget):
        automatic = True

        def probe(self) -> Availability:
            return Availability(False, "onnxruntime is not installed", "pip install 'alight[onnx]'")

    monkeypatch.setattr(plugins, "targets", lambda: {"onnx": Away()})
    with pytest.raises(TargetUnavailable, match=r"pip install 'alight\[onnx\]'"):
        api.load(str(onnx_folder(tmp_path / "m")))
