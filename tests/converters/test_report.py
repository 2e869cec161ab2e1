"""The report: JSON that tells everything, and a page that stands alone."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from alight.artifact import Description
from alight.cli import application
from alight.store import Store
from alight_converters.report_html import page
from alight_converters.report_svg import Dot, bars, line, scatter

EVIL = "<script>alert('&')</script>\"]]>"


def candidate(name: str, size: float, kl: float | None, decode: float, pareto: bool) -> dict[str, Any]:
    return {
        "quantization": name,
        "size": size * 1e6,
        "prediction": {
            "memory": {"weights": 1, "kv": 1, "compute": 1, "runtime": 1},
            "decode": decode / 2,
        },
        "quality": {"tokens": 1024, "perplexity": 5.1, "kl_mean": kl, "kl_p99": kl, "top1": 0.9},
        "speed": {"prefill": 100.0, "decode": decode},
        "stream_speed": None,
        "memory_bytes": 0,
        "is_source": False,
        "format": "gguf",
        "pareto": pareto,
    }


REPORT: dict[str, Any] = {
    "alight": "0.1.0",
    "created": "2026-11-22T12:00:00+00:00",
    "versions": {"python": "3.11"},
    "source": {"name": "smollm2"},
    "device": {"id": "this", "name": "a board"},
    "measured_on": {"processor": "a CPU", "cores": 2, "system": "Linux x86_64"},
    "quality_measured_on": "text",
    "limits": {"max_kl": 0.05},
    "settings": {"seed": 0},
    "stages": [
        {
            "kind": "distil",
            "seconds": 12.0,
            "cached": False,
            "parameters": 1e8,
            "bytes": 4e8,
            "measured": {
                "losses": [3.0, 2.5, 2.25],
                "influence": [0.1, 0.5, 0.2],
                "tensors": {"blk.0.attn_q.weight": {"Q4_K": 0.1}, "blk.1.attn_q.weight": {"Q4_K": 0.2}},
                "removed": [{"layer": 3, "kl": 0.125}],
                "tokens": 512,
            },
        }
    ],
    "candidates": [
        candidate("Q8_0", 140, 0.004, 45, True),
        candidate("Q5_0", 120, 0.06, 30, False),
        candidate("Q4_0", 90, 0.2, 60, True),
        candidate("F16", 270, 0.0, 20, False),
    ],
    "chosen": "Q8_0",
    "reason": "the fastest",
    "samples": [{"prompt": "Who?", "source": "I am", "artifact": "Me"}],
    "fallbacks": [
        {"tensor": "blk.0.attn_q.weight", "wanted": "Q3_K", "taken": "Q4_0"},
        {"tensor": "blk.1.attn_q.weight", "wanted": "Q3_K", "taken": "Q4_0"},
        {"tensor": "token_embd.weight", "wanted": "Q6_K", "taken": "Q8_0"},
    ],
}


def parsed(html: str) -> ElementTree.Element:
    """The page is XML but for its doctype: anything unclosed or unescaped fails."""
    return ElementTree.fromstring(html.partition("\n")[2])


def everything(data: Any) -> Any:
    """The same report with a hostile text in place of every text that comes from outside."""
    if isinstance(data, dict):
        return {EVIL + k if k == "tokens" else k: everything(v) for k, v in data.items()}
    if isinstance(data, list):
        return [everything(x) for x in data]
    return EVIL if isinstance(data, str) else data


def test_the_page_shows_everything() -> None:
    html = page(REPORT)
    root = parsed(html)
    titles = [f.findtext("b") for f in root.iter("figure")]
    assert titles == ["Loss", "Perplexity", "Speed", "losses", "influence", "tensors: Q4_K"]
    loss, perplexity, *_ = root.iter("svg")
    assert len(loss.findall("circle")) == 3, "a KL of 0 has no place on a logarithmic axis"
    assert len(perplexity.findall("circle")) == 4
    assert [c.get("class") for c in perplexity.findall("circle")] == [
        "dot chosen",
        "dot ",
        "dot front",
        "dot ",
    ]
    assert len(perplexity.findall("polyline")) == 1
    text = "".join(root.itertext())
    for told in ("Chosen: Q8_0, the fastest.", "I am", "Me", "0.125", "a CPU, 2 cores", '"seed": 0', "512"):
        assert told in text


def test_types_that_did_not_fit_are_counted_and_listed() -> None:
    (folded,) = parsed(page(REPORT)).iter("details")
    assert folded.findtext("summary") == "All 3"
    assert [row.findtext("td") for row in folded.iter("tr")][1:] == [f["tensor"] for f in REPORT["fallbacks"]]
    assert "2 are Q4_0, not Q3_K, 1 are Q8_0, not Q6_K" in page(REPORT)
    assert "<details>" not in page(REPORT | {"fallbacks": []})


def elsewhere(streams: int) -> dict[str, Any]:
    """The same report of a build for another device."""
    return REPORT | {"device": {"id": "pi", "name": "a Pi"}, "limits": {"max_kl": 0.05, "streams": streams}}


def test_speeds_say_of_what_they_are() -> None:
    here = copy.deepcopy(REPORT)
    here["limits"]["streams"] = 4
    here["candidates"][0]["stream_speed"] = 12.5
    text = "".join(parsed(page(here)).itertext())
    assert "decode measured, of each of 4 streams" in text and "12.5" in text
    assert "a CPU, 2 cores, Linux x86_64, of each of 4 streams" in text
    text = "".join(parsed(page(elsewhere(4))).itertext())
    assert "decode measured on the building machine, one stream" in text
    assert "decode predicted for a Pi, of each of 4 streams" in text
    assert "memory predicted for a Pi, MB" in text


def test_the_page_stands_alone() -> None:
    html = page(REPORT)
    assert not re.search(r"\b(src|href|url\(|@import|https?:)", html)
    assert "<script" not in html
    assert "prefers-color-scheme: dark" in html


def test_everything_is_escaped() -> None:
    report = copy.deepcopy(REPORT)
    hostile = {
        key: everything(report[key])
        for key in ("source", "device", "stages", "samples", "settings", "reason")
    }
    html = page(report | hostile)
    assert "<script" not in html
    assert EVIL in "".join(parsed(html).itertext())


def test_plots_of_odd_numbers() -> None:
    assert scatter([], "x", "y") == ""
    assert scatter([Dot(1, math.nan, "a")], "x", "y") == ""
    assert line([1.0], "x", "y") == ""
    for svg in (
        scatter([Dot(1, 1, "a")], "x", "y"),
        scatter([Dot(0, 0, "a"), Dot(0, 0, "b")], "x", "y"),
        scatter([Dot(i, 10.0**-i, "a") for i in range(9)], "x", "y", log_y=True),
        line([5.0, math.inf, 5.0, math.nan, 5.0], "x", "y"),
        bars(["a", "b"], [0.0, 0.0], "x", "y"),
        bars(["a", "b"], [-1.0, 2.0], "x", "y"),
    ):
        root = ElementTree.fromstring(svg)
        assert "nan" not in svg
        assert "inf" not in svg
        assert root.findall("text")


def keep(tmp_path: Path, name: str, report: dict[str, Any]) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "model.gguf").write_text("x")
    files = {inside: tmp_path / inside for inside in ("report.json", "model.gguf")}
    Store().add(name, files, Description("gguf"))


def test_the_verb_shows_the_speed_that_counts(tmp_path: Path) -> None:
    together = copy.deepcopy(REPORT)
    together["limits"]["streams"] = 4
    together["candidates"][0]["stream_speed"] = 12.5
    keep(tmp_path, "here", together)
    keep(tmp_path, "there", elsewhere(2))
    here, there = (CliRunner().invoke(application(), ["report", name]).stdout for name in ("here", "there"))
    assert "measured on a CPU, Linux x86_64, of each of 4 streams" in here
    assert "12.5" in here and "45.0" not in here
    assert "predicted for a Pi, of each of 2 streams" in there
    assert "TOK/S~" in there and "22.5" in there and "45.0" not in there
    assert "~ predicted for a Pi; quality is measured where it was built." in there


@pytest.fixture
def built(tmp_path: Path) -> None:
    """A model of the store with a report."""
    files = {}
    for name, text in {
        "report.json": json.dumps(REPORT),
        "report.html": page(REPORT),
        "model.gguf": "x",
    }.items():
        files[name] = tmp_path / name
        files[name].write_text(text)
    artifact = Store().add("built", files, Description("gguf"))
    kinds = {layer.path: layer.media_type for layer in artifact.layers}
    assert kinds["report.html"] == kinds["report.json"] == "application/vnd.cncf.model.doc.v1.raw"
    Store().add("bare", {"model.gguf": files["model.gguf"]}, Description("gguf"))


@pytest.mark.usefixtures("built")
def test_the_report_verb(tmp_path: Path) -> None:
    def alight(*words: str) -> Any:
        return CliRunner().invoke(application(), ["report", *words])

    shown = alight("built")
    assert shown.exit_code == 0
    assert "Q8_0, the fastest" in shown.stdout
    assert '"chosen": "Q8_0"' in alight("built", "--json").stdout
    assert alight("built", "--html", str(tmp_path / "out.html")).exit_code == 0
    assert (tmp_path / "out.html").read_text() == page(REPORT)
    failed = alight("bare")
    assert "has no report" in str(failed.exception)
