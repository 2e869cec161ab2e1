"""Blobs that come in pieces, models composed of blobs, and presets."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from alight.artifact import Artifact, Description, Layer, digest_of, media_type
from alight.errors import BadInput, DigestMismatch, DiskFull, InvalidModelFile, StoreError
from alight.preset import PRESET, Preset, adapters_of
from alight.store import Store

GGUF = Description("gguf", "llama", 64, "F32")
DATA = os.urandom(100_000)
DIGEST = digest_of(DATA)
LAYER = Layer("model.gguf", media_type("model.gguf"), DIGEST, len(DATA))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def upload(store: Store, data: bytes = DATA, digest: str = "") -> None:
    with store.upload(digest or digest_of(data), len(data)) as upload:
        for start in range(0, len(data), 30_000):
            upload.write(data[start : start + 30_000])
        upload.finish()


def left_over(store: Store) -> list[Path]:
    return [*(store.root / "uploads").iterdir()]


def test_an_upload_becomes_a_model(store: Store) -> None:
    assert store.find_blob(DIGEST) is None
    upload(store)
    found = store.find_blob(DIGEST)
    assert found and found.read_bytes() == DATA
    assert store.names() == [] and not store.blobs.exists(), "not in the layout until a model needs it"
    made = store.compose("m", [LAYER], GGUF, small={PRESET: b"{}"}, annotations={"alight.source": "here"})
    assert [layer.path for layer in made.layers] == ["model.gguf", PRESET]
    assert made.weights[0].read_bytes() == DATA
    assert made.weights[0] == store.find_blob(DIGEST)
    assert (made.lineage, made.description) == (DIGEST, GGUF)
    assert left_over(store) == []
    assert store.verify() == []


def test_models_share_blobs(store: Store) -> None:
    upload(store)
    one = store.compose("one", [LAYER], GGUF)
    two = store.compose("two", one.layers, GGUF, small={PRESET: b'{"system":"a"}'}, lineage=one.lineage)
    again = store.compose("two", two.layers, GGUF, small={PRESET: b'{"system":"b"}'})
    assert len(again.layers) == 2, "a new file takes the place of the old one"
    assert again.weights == one.weights
    store.remove("one")
    assert store.verify() == [] and store.get("two").weights[0].read_bytes() == DATA


def test_a_blob_that_is_not_here(store: Store) -> None:
    with pytest.raises(StoreError, match="there is no blob"):
        store.compose("m", [LAYER], GGUF)
    assert store.names() == []
    with pytest.raises(BadInput, match="not a sha256 digest"):
        store.find_blob("sha256:../../etc")
    with pytest.raises(BadInput, match="not a sha256 digest"):
        store.upload("sha256:" + "A" * 64)


def test_wrong_bytes_are_dropped(store: Store) -> None:
    with pytest.raises(DigestMismatch, match="digest mismatch"):
        upload(store, DATA[:-1], DIGEST)
    assert store.find_blob(DIGEST) is None
    assert left_over(store) == []


def test_what_is_not_finished_is_dropped(store: Store) -> None:
    with pytest.raises(KeyError), store.upload(DIGEST) as upload:
        upload.write(DATA)
        raise KeyError
    assert left_over(store) == []


def test_removing_a_model_leaves_uploads_alone(store: Store) -> None:
    upload(store)
    other = b"other"
    upload(store, other)
    store.compose("m", [replace(LAYER, digest=digest_of(other), size=len(other))], GGUF)
    store.remove("m")
    assert store.find_blob(DIGEST)
    os.utime(store.find_blob(DIGEST) or "", (0, 0))
    upload(store, other)
    store.compose("m", [replace(LAYER, digest=digest_of(other), size=len(other))], GGUF)
    assert store.find_blob(DIGEST) is None, "nobody needed it for a day"


def test_the_same_upload_twice_at_once(store: Store) -> None:
    threads = [threading.Thread(target=upload, args=(store,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(left_over(store)) == 1
    assert store.find_blob(DIGEST)


def test_a_full_disk(small_disk: Path) -> None:
    store = Store(small_disk / "models")
    big = os.urandom(2 << 20)
    with pytest.raises(DiskFull, match="MB needed"):
        upload(store, big)
    with pytest.raises(DiskFull), store.upload(digest_of(big)) as chunked:  # the size is not known before
        chunked.write(big)
        chunked.finish()
    assert left_over(store) == []
    upload(store, b"small")
    assert store.find_blob(digest_of(b"small"))


def preset_of(store: Store, data: bytes) -> Preset:
    upload(store)
    return Preset.of(store.compose("m", [LAYER], GGUF, small={PRESET: data}))


def test_preset_round_trip(store: Store) -> None:
    messages = ({"role": "user", "content": "hé"},)
    preset = Preset("be brief", "{{ x }}", "{{ .X }}", {"temperature": 0}, messages, "base")
    assert preset_of(store, preset.to_bytes()) == preset
    assert json.loads(Preset(system="x").to_bytes()) == {"system": "x"}
    assert Preset.of(None) == Preset.of(store.compose("n", [LAYER], GGUF)) == Preset()


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b'{"system": 1}', b'{"messages": [1]}', b'{"parameters": []}', b"\xff"]
)
def test_a_damaged_preset(store: Store, data: bytes) -> None:
    with pytest.raises(InvalidModelFile, match=r"preset\.json"):
        preset_of(store, data)


def test_a_preset_comes_first() -> None:
    hi = {"role": "user", "content": "hi"}
    first = {"role": "user", "content": "first"}
    mine = {"role": "system", "content": "mine"}
    preset = Preset("theirs", messages=(first,))
    assert preset.apply_to([hi]) == [{"role": "system", "content": "theirs"}, first, hi]
    assert preset.apply_to([mine, hi]) == [mine, first, hi]
    assert Preset().apply_to([hi]) == [hi]


def test_adapters_are_no_weights(store: Store) -> None:
    upload(store)
    upload(store, b"lora")
    adapter = Layer("style.lora", media_type("style.lora"), digest_of(b"lora"), 4)
    made: Artifact = store.compose("m", [LAYER, adapter], GGUF)
    assert len(made.weights) == 1
    assert adapters_of(made) == (("style", str(made.files["style.lora"])),)
