"""The store: an OCI layout that survives killed writers, full disks and other tools."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from alight.artifact import ARTIFACT, FILEPATH, Artifact, Description
from alight.errors import BadInput, DigestMismatch, DiskFull, InvalidModelFile, ModelNotFound, StoreError
from alight.store import Store, hash_file, normal_name

GGUF = Description("gguf", "llama", 64, "F32", "Apache-2.0")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(100_000))
    return path


def add(store: Store, file: Path, name: str = "m", **more: object) -> Artifact:
    return store.add(name, {"model.gguf": file}, GGUF, **more)  # type: ignore[arg-type]


def test_what_goes_in_comes_out(store: Store, weights: Path) -> None:
    made = add(store, weights, annotations={"alight.source": "here"})
    got = store.get("m")
    assert got == made
    assert got.name == "m"
    assert got.weights[0].read_bytes() == weights.read_bytes()
    assert got.lineage == hash_file(weights)
    assert got.description == GGUF
    assert store.get(got.digest).digest == got.digest
    assert store.verify() == []
    assert weights.exists()


def test_the_layout_is_oci_and_modelpack(store: Store, weights: Path) -> None:
    artifact = add(store, weights)
    root = store.root
    assert json.loads((root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads((root / "index.json").read_text())["manifests"]
    manifest = json.loads((root / "blobs/sha256" / entry["digest"].removeprefix("sha256:")).read_text())
    assert entry["digest"] == artifact.digest
    assert manifest["artifactType"] == ARTIFACT
    (layer,) = manifest["layers"]
    assert layer["mediaType"] == "application/vnd.cncf.model.weight.v1.raw"
    assert layer["annotations"][FILEPATH] == "model.gguf"
    config = json.loads(
        (root / "blobs/sha256" / manifest["config"]["digest"].removeprefix("sha256:")).read_text()
    )
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"]]}
    assert config["config"]["format"] == "gguf"


def test_the_same_content_has_the_same_digest(store: Store, weights: Path, tmp_path: Path) -> None:
    assert add(store, weights).digest == add(Store(tmp_path / "other"), weights, "n").digest


def test_names(store: Store, weights: Path) -> None:
    add(store, weights, "Org/Model")
    assert store.names() == ["org/model:latest"]
    assert "ORG/model:latest" in store
    store.tag("org/model", "short:q8")
    assert store.get("short:q8").digest == store.get("org/model").digest
    with pytest.raises(ModelNotFound, match="no model named 'org/modle'") as caught:
        store.get("org/modle")
    assert "org/model" in caught.value.hint


@pytest.mark.parametrize("name", ["", "../x", "a b", "a:b:c", "/a", "a//b", "ü", "x" * 300, "a:", "-a"])
def test_bad_names(name: str) -> None:
    with pytest.raises(BadInput, match="not a model name"):
        normal_name(name)


def test_remove_frees_what_nothing_else_needs(store: Store, weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"different")
    add(store, weights, "a")
    store.tag("a", "b")
    add(store, other, "c")
    assert store.remove("a") == 0
    assert store.verify() == []
    assert store.remove("b") > 100_000
    assert store.names() == ["c:latest"]
    assert store.verify() == []
    with pytest.raises(ModelNotFound):
        store.remove("b")


def test_moved_files_are_not_copied(store: Store, weights: Path) -> None:
    inode = weights.stat().st_ino
    artifact = add(store, weights, move=True)
    assert not weights.exists()
    assert artifact.weights[0].stat().st_ino == inode


def test_a_broken_promise_adds_nothing(store: Store, weights: Path) -> None:
    with pytest.raises(DigestMismatch, match="promised"):
        add(store, weights, digests={"model.gguf": "sha256:" + "0" * 64})
    assert store.names() == []
    assert list(store.blobs.iterdir()) == []


@pytest.mark.parametrize("path", ["../up.gguf", "/etc/x", "a/../../b", "a\\b", "c:x", ""])
def test_paths_never_leave_the_model(store: Store, weights: Path, path: str) -> None:
    with pytest.raises(InvalidModelFile):
        store.add("m", {path: weights}, GGUF)
    assert store.names() == []


def test_verify_finds_a_flipped_bit(store: Store, weights: Path) -> None:
    blob = add(store, weights).weights[0]
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[500] ^= 1
    blob.write_bytes(data)
    (problem,) = store.verify("m")
    assert (problem.path, problem.what) == ("model.gguf", "content differs from its digest")
    blob.write_bytes(data[:-1])
    assert "bytes, not" in store.verify("m")[0].what
    blob.unlink()
    assert store.verify("m")[0].what == "missing"


def test_a_damaged_index_is_told(store: Store, weights: Path) -> None:
    add(store, weights)
    (store.root / "index.json").write_text('{"manif')
    with pytest.raises(StoreError, match="damaged"):
        store.names()


def test_a_damaged_manifest_hides_one_model_only(store: Store, weights: Path, tmp_path: Path) -> None:
    broken = add(store, weights, "broken")
    other = tmp_path / "o.gguf"
    other.write_bytes(b"o")
    add(store, other, "fine")
    manifest = store.blob(broken.digest)
    manifest.chmod(0o644)
    manifest.write_bytes(b"{")
    assert [a.name for a in store.artifacts()] == ["fine"]
    assert [p.model for p in store.verify()] == ["broken:latest"]


def test_writers_take_turns(store: Store, tmp_path: Path) -> None:
    def work(i: int) -> None:
        file = tmp_path / f"{i}.gguf"
        file.write_bytes(os.urandom(20_000))
        add(Store(store.root), file, f"m{i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert store.names() == [f"m{i}:latest" for i in range(8)]
    assert store.verify() == []


WRITER = """
import sys
from pathlib import Path
from alight.artifact import Description
from alight.store import Store
store = Store(sys.argv[1])
while True:
    print("go", flush=True)
    store.add(sys.argv[3], {"model.gguf": Path(sys.argv[2])}, Description("gguf"))
    store.remove(sys.argv[3])
"""


def test_killed_writers_leave_the_store_intact(store: Store, weights: Path, tmp_path: Path) -> None:
    add(store, weights, "kept")
    big = tmp_path / "big.gguf"
    big.write_bytes(os.urandom(30_000_000))
    for round_ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store.root), str(big), "writing"], stdout=subprocess.PIPE
        )
        assert writer.stdout
        writer.stdout.readline()
        time.sleep(0.013 * round_)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert store.verify() == [], f"round {round_}"
        assert store.get("kept").weights[0].read_bytes() == weights.read_bytes()
    add(store, weights, "after")
    assert list((store.root / "tmp").iterdir()) == [], "the next writer sweeps up"


def test_a_full_disk_loses_nothing(small_disk: Path, tmp_path: Path, weights: Path) -> None:
    store = Store(small_disk / "models")
    add(store, weights, "fits")
    big = tmp_path / "big.gguf"
    big.write_bytes(bytes(3_000_000))
    with pytest.raises(DiskFull, match=r"3\.0 MB needed"):
        add(store, big, "too-big")
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(65536))
    with pytest.raises(DiskFull):
        store.tag("fits", "again")
    assert store.names() == ["fits:latest"]
    assert store.verify() == []


@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo (Debian package) is not installed")
def test_skopeo_copies_out_and_in(store: Store, weights: Path, tmp_path: Path) -> None:
    made = add(store, weights, "model:q8")

    def copy(source: Path, name: str, target: Path, new: str) -> None:
        command = ["skopeo", "--insecure-policy", "copy", f"oci:{source}:{name}", f"oci:{target}:{new}"]
        subprocess.run(command, check=True, capture_output=True)

    copy(store.root, "model:q8", tmp_path / "elsewhere", "there")
    assert Store(tmp_path / "elsewhere").get("there").digest == made.digest
    fresh = Store(tmp_path / "fresh")
    add(fresh, weights, "already")
    copy(tmp_path / "elsewhere", "there", fresh.root, "back:v1")
    assert fresh.get("back:v1").weights[0].read_bytes() == weights.read_bytes()
    assert fresh.verify() == []
    assert fresh.names() == ["already:latest", "back:v1"]
