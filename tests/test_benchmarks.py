"""The serving benchmark's own logic: arguments, statistics, reports and the streaming client. It measures nothing."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # its files are scripts, not a package

import serving
import serving_report as report
import serving_stats as stats
from serving_cases import CASES, Prompts
from serving_client import Client, ServerFailed
from serving_report import Record
from serving_servers import Setting

KEYS = (
    "decode_1",
    "throughput_8",
    "throughput_32",
    "ttft_shared_prefix",
    "itl_p95_long_prompt",
    "embedded_decode_1",
)


def test_arguments() -> None:
    assert serving.NAMES == KEYS
    plain = serving.arguments([])
    assert tuple(plain.only) == KEYS
    assert not plain.quick
    chosen = serving.arguments(["--quick", "--only", "throughput_8,decode_1", "--rounds", "2"])
    assert chosen.only == ["decode_1", "throughput_8"]  # always in the same order
    assert (chosen.quick, chosen.rounds) == (True, 2)
    for wrong in (["--only", "decode_2"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            serving.arguments(wrong)


def test_statistics() -> None:
    assert stats.percentile(range(1, 101), 95) == 95
    assert stats.percentile([3, 1, 2], 95) == 3
    assert stats.percentile([7], 95) == 7
    assert stats.medians([{"value": 1, "a": 5}, {"value": 3, "a": 5}, {"value": 2, "a": 8}]) == {
        "value": 2,
        "a": 5,
    }
    assert stats.ratios([(1, 2), (3, 3)]) == [0.5, 1]


def test_prompts_are_fresh_and_repeatable() -> None:
    prompts, again = Prompts(1), Prompts(1)
    first, second = prompts.text(71), prompts.text(71)
    assert first == again.text(71)
    assert first.split()[0] != second.split()[0]
    assert len(first.split()) == 70  # and the full stop


def record(case: str, engine: str, number: int, value: float, *, trial: bool = False) -> Record:
    figures = {"value": value, "first": 0.1}
    setting = "" if engine in ("alight", "vllm") else "split"
    return Record(case, engine, setting, number, figures, [figures], 300_000_000, 0.05, trial=trial)


RECORDS = [
    record("throughput_8", "llama-server", -1, 1, trial=True),
    record("throughput_8", "alight", 0, 110),
    record("throughput_8", "llama-server", 0, 100),
    record("throughput_8", "llama-server", 1, 50),  # a slower moment of the machine
    record("throughput_8", "alight", 1, 60),
    record("throughput_8", "alight", 2, 108),
    record("throughput_8", "llama-server", 2, 100),
    record("throughput_8", "alight", 3, 1000),  # its peer's measurement is missing
    record("throughput_8", "vllm", 0, 90),
    record("itl_p95_long_prompt", "alight", 0, 0.3),
    record("itl_p95_long_prompt", "llama-server", 0, 0.2),
]
WORKS = [serving._work(name) for name in KEYS]


def test_json() -> None:
    told = json.loads(json.dumps(report.to_json(WORKS, RECORDS, {"threads": 2})))
    assert told["ratios"] == {"throughput_8": 1.1, "itl_p95_long_prompt": 1.5}  # in pairs, without the trial
    assert len(told["rounds"]) == len(RECORDS)
    assert told["rounds"][0]["trial"] is True
    assert told["machine"]["cores"] >= 1
    assert told["versions"]["llama-cpp-python"]
    assert told["settings"] == {"threads": 2}


def test_table() -> None:
    rows = report.table(WORKS, RECORDS).splitlines()
    assert len(rows) == 5  # head, rule, two cases, vLLM
    assert "**1.100** (1.08–1.20) | >= 1.00 ✓ | 300 / 300 |" in rows[2]
    assert "**1.500** (1.50–1.50) | <= 1.00 ✗ |" in rows[3]
    assert "vLLM: 90 tok/s" in rows[4]
    told = report.details(WORKS, RECORDS)
    assert "llama-server, split (trial)" in told
    assert "client_cpu 0.05" in told


def test_overhead_of_a_step() -> None:
    one = record("decode_1", "alight", 0, 100)
    one.metrics = {
        "alight_engine_steps_total": 100,
        "alight_engine_step_seconds_total": 2.0,
        "alight_engine_decode_seconds_total": 1.5,
    }
    told = report.step_overhead([one], "decode_1")
    assert told == {"ms": pytest.approx(5), "of_ms": pytest.approx(20), "share": pytest.approx(0.25)}
    assert report.step_overhead([record("decode_1", "alight", 0, 100)], "decode_1") == {}


def test_every_case_has_a_peer() -> None:
    for case in CASES.values():
        assert case.peer
        for slots, context, _ in case.peer.values():
            assert context // slots >= 256


def test_a_setting_tells_no_path() -> None:
    setting = Setting("vllm", "", ("/opt/somewhere/python", "-m", "vllm", "/data/model"), (("A", "1"),))
    assert str(setting) == "A=1 python -m vllm model"


def ask(body: bytes, tokens: int, head: str = "200 OK\r\nTransfer-Encoding: chunked") -> object:
    """One request to a server that answers with these bytes, in pieces of 7."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {head}\r\n\r\n".encode())
        for at in range(0, len(body), 7):
            part = body[at : at + 7]
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        writer.close()

    async def both() -> object:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await Client(f"http://127.0.0.1:{port}", "m").complete("hello", tokens)

    return asyncio.run(both())


def events(*data: dict[str, object]) -> bytes:
    return b"".join(b"data: " + json.dumps(d).encode() + b"\n\n" for d in data)


def test_the_client_counts_pieces_and_tokens() -> None:
    pieces = [{"choices": [{"text": text}]} for text in ("", "a", "b", "")]
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
    stream = ask(events(*pieces, usage) + b"data: [DONE]\n\n", 3)
    assert (stream.text, stream.tokens, stream.prompt_tokens) == (["a", "b"], 3, 5)
    assert len(stream.pieces) == 2
    assert stream.first > 0


@pytest.mark.parametrize(
    ("body", "head", "said"),
    [
        (events({"error": {"message": "no room"}}), "200 OK\r\nTransfer-Encoding: chunked", "no room"),
        (b"", "200 OK\r\nTransfer-Encoding: chunked", "broke off"),
        (b"x", "503 Busy", "503"),
        (
            events({"choices": []}) + b"data: [DONE]\n\n",
            "200 OK\r\nTransfer-Encoding: chunked",
            "asked for 3",
        ),
    ],
)
def test_the_client_reports_what_fails(body: bytes, head: str, said: str) -> None:
    with pytest.raises(ServerFailed, match=said):
        ask(body, 3, head)
