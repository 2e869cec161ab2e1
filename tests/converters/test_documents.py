"""Calibration text as data sets have it: JSON, parquet, what `datasets` saves, and the Hugging Face hub."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
from hub_server import HubServer
from transformers import PreTrainedTokenizerFast

from alight.errors import AlightError, BadInput, MissingExtra, SourceError
from alight_converters import Recipe
from alight_converters.build_weights import calibration_of
from alight_converters.checkpoint import Checkpoint
from alight_converters.documents import documents, local
from alight_converters.recipe_stages import calibration_key, calibration_rows

ROWS = [{"text": "The first."}, {"text": "The second."}]
READ = ["The first.</s>", "The second.</s>"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    """A copy, so that a test may change it."""
    tiny_checkpoints.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for variable in [
        name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")
    ]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    local.cache_clear()
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def test_json_is_an_array_or_lines(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    array, lines = tmp_path / "array.json", tmp_path / "lines.json"
    array.write_text(json.dumps(ROWS, indent=1))
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    assert list(documents(array, tokenizer)) == list(documents(lines, tokenizer)) == READ


def test_a_folder_is_read_without_its_test_split_and_its_descriptions(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for name in ("README.md", "dataset_info.json", "data/test-00000.jsonl", "data/validation.jsonl"):
        (folder / name).write_text('{"text": "Not this one."}\n')
    (folder / "data" / "train-00000.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert list(documents(folder, tokenizer)) == READ


def test_parquet_without_pyarrow_names_the_command(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(
        MissingExtra, match=r"reading a\.parquet needs .*\nRun: pip install 'alight\[parquet\]'"
    ):
        list(documents(tmp_path / "a.parquet", tokenizer))


def parquet(file: Path, rows: dict[str, list[Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(rows), file)


def arrow(file: Path, rows: dict[str, list[Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(rows)
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


@pytest.mark.parametrize("write", [parquet, arrow])
def test_tables_of_columns(
    write: Callable[[Path, dict[str, list[Any]]], None], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = tmp_path / f"rows.{write.__name__}"
    write(file, {"id": [1, 2], "text": [row["text"] for row in ROWS]})
    assert list(documents(file, tokenizer)) == READ
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    write(file, {"messages": [[{"role": "user", "content": "Hi"}]]})
    assert list(documents(file, tokenizer)) == ["user: Hi;"]
    write(file, {"body": ["x"]})
    with pytest.raises(BadInput, match="no column 'text' or 'messages', only body"):
        list(documents(file, tokenizer))
    file.write_bytes(b"this is none, whatever its name says")
    with pytest.raises(BadInput, match=rf"is no \.{write.__name__} file"):
        list(documents(file, tokenizer))


def test_a_data_set_of_the_hub(hub: HubServer, tiny: Checkpoint) -> None:
    text = json.dumps({"text": "A sentence of the hub. " * 200})
    files = {"data/train.jsonl": text.encode(), "data/test.jsonl": b"not read", "README.md": b"# a set"}
    hub.add("datasets/org/set", files)
    data = {"source": str(tiny.folder), "name": "x", "export": [{"format": "gguf"}]}
    recipe = Recipe.parse(data | {"calibration": {"text": "hf://datasets/org/set", "rows": 2, "length": 16}})
    assert Recipe.parse(recipe.model_dump(mode="json", by_alias=True)) == recipe
    made = calibration_rows(recipe.calibration, 0, tiny, "cpu", lambda what, done, total: None)
    assert tiny.tokenizer().decode(made.rows[0]).startswith("A sentence of the hub.")
    assert [r.path.rpartition("/")[2] for r in hub.contents] == ["train.jsonl"]

    key = calibration_key(recipe.calibration, 0, tiny)
    local.cache_clear()
    assert calibration_key(recipe.calibration, 0, tiny) == key
    assert len(hub.contents) == 1, "what is here is not downloaded again"

    by_build = calibration_of(tiny, "hf://datasets/org/set", seed=0)
    assert by_build.origin == "hf://datasets/org/set"
    assert by_build.rows.flatten().tolist()[:16] == made.rows[0].tolist()

    tested = local("hf://datasets/org/set:data/test*")
    assert [f.name for f in tested.rglob("*") if f.is_file()] == ["test.jsonl"], "only what was asked for"


@pytest.mark.parametrize(
    ("address", "error", "told"),
    [
        (
            "hf://datasets/org",
            BadInput,
            "is no address of a data set\nWrite it as hf://datasets/organisation/name",
        ),
        ("hf://datasets/org/none", SourceError, "none"),
        ("hf://datasets/org/set:data/*.csv", SourceError, "has no file 'data/\\*.csv'"),
        ("hf://datasets/org/pictures", SourceError, "has no .txt, .md, "),
    ],
)
def test_a_data_set_that_is_not_there(
    hub: HubServer, address: str, error: type[AlightError], told: str
) -> None:
    hub.add("datasets/org/set", {"train.jsonl": b""})
    hub.add("datasets/org/pictures", {"a.png": b""})
    with pytest.raises(error, match=told):
        local(address)
