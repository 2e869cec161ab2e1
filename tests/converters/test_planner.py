"""The planner: shapes from headers, sizes as llama.cpp writes them, memory as this machine shows it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from checkpoints import checkpoint

from alight import devices, planner
from alight.errors import BadInput, DoesNotFit, InvalidModelFile
from alight.gguf import read_header
from alight_converters.quantize.gguf import quantize


@pytest.fixture(scope="module")
def shape(smollm2_file: Path) -> planner.Shape:
    return planner.shape_of_gguf([read_header(smollm2_file)])


def test_shape_of_real_weights(shape: planner.Shape) -> None:
    assert (shape.layers, shape.hidden, shape.ffn, shape.kv_width) == (30, 576, 1536, 192)
    assert (shape.vocabulary, shape.trained_context, shape.tied) == (49152, 8192, True)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"])
def test_sizes_are_those_the_quantizer_writes(
    shape: planner.Shape, smollm2_file: Path, tmp_path: Path, kind: str
) -> None:
    written = read_header(quantize(smollm2_file, tmp_path / "x.gguf", kind)).weight_bytes
    assert planner.quantized(shape, kind).weight_bytes == pytest.approx(written, rel=0.03)


LOAD = """
import json, sys, psutil, alight
with alight.load(sys.argv[1], context=int(sys.argv[2]), kv_type=sys.argv[3], mmap=False) as model:
    prompt = (model.tokenize("word ") * model.info.context)[: model.info.context - 4]
    model.complete(prompt, max_tokens=4, temperature=0)
    print(psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize(
    ("kind", "context", "kv_type"), [("Q8_0", 512, "f16"), ("Q4_0", 4096, "f16"), ("Q4_1", 4096, "q8_0")]
)
def test_memory_within_ten_percent(
    shape: planner.Shape, smollm2_file: Path, tmp_path: Path, kind: str, context: int, kv_type: str
) -> None:
    file = quantize(smollm2_file, tmp_path / "x.gguf", kind)
    command = [sys.executable, "-c", LOAD, str(file), str(context), kv_type]
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    predicted = planner.memory(planner.quantized(shape, kind), context=context, kv_type=kv_type).total
    assert predicted == pytest.approx(measured, rel=0.10)


def test_context_shrinks_only_where_nobody_asked(shape: planner.Shape) -> None:
    whole = planner.memory(shape, context=4096).total
    assert planner.fit_context(shape, None, 2 * whole) == 4096
    assert planner.fit_context(shape, None, whole) == 2048
    assert planner.fit_context(shape, 8192, 10 * whole) == 8192
    with pytest.raises(DoesNotFit, match=r"context of 8192 tokens needs about \d+ MB but \d+ MB are free"):
        planner.fit_context(shape, 8192, whole)
    with pytest.raises(DoesNotFit):
        planner.fit_context(shape, None, whole // 3)


def test_plan_for_known_boards(shape: planner.Shape) -> None:
    pi = devices.profile("raspberry-pi-5-8gb")
    forms = planner.plan(shape, pi)
    assert [f.quantization for f in forms] == ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"]
    assert all(a.memory.weights > b.memory.weights for a, b in pairwise(forms))
    old = devices.profile("raspberry-pi-4-2gb")
    assert planner.plan(shape, old)[0].decode < forms[0].decode


def test_what_was_asked_for_is_never_left_out(shape: planner.Shape) -> None:
    pi = devices.profile("raspberry-pi-5-8gb")
    asked = ("Q4_0", "Q8_0", "Q4_0+imatrix")
    assert [p.quantization for p in planner.plan(shape, pi, types=asked, distinct=False)] == list(asked)
    assert [p.quantization for p in planner.plan(shape, pi, types=asked)] == ["Q4_0", "Q4_0+imatrix"]


def test_limits_say_which_one_binds(shape: planner.Shape) -> None:
    pi = devices.profile("raspberry-pi-5-8gb")
    with pytest.raises(DoesNotFit, match=r"even at Q4_0, on Raspberry Pi 5.* needs about \d+ MB but 100 MB"):
        planner.plan(shape, pi, max_memory=100_000_000)
    with pytest.raises(BadInput, match=r"no form reaches 100000 tokens/s on Raspberry Pi 5"):
        planner.plan(shape, pi, min_speed=100_000)
    some = planner.plan(
        shape, pi, max_memory=planner.memory(planner.quantized(shape, "Q5_K_M"), context=4096).total
    )
    assert [f.quantization for f in some] == ["Q5_K_M", "Q4_K_M", "Q4_0"]


def test_a_form_within_the_doubt_about_memory_is_kept_where_it_is_measured(shape: planner.Shape) -> None:
    pi = devices.profile("raspberry-pi-5-8gb")
    predicted = planner.memory(planner.quantized(shape, "Q8_0"), context=4096).total
    just_under = {"types": ("Q8_0",), "max_memory": int(0.97 * predicted)}
    assert planner.plan(shape, replace(pi, id="this"), **just_under)
    with pytest.raises(DoesNotFit):
        planner.plan(shape, pi, **just_under)
    with pytest.raises(DoesNotFit):
        planner.plan(shape, replace(pi, id="this"), types=("Q8_0",), max_memory=int(0.93 * predicted))


def test_streams_take_memory_and_share_the_arithmetic(shape: planner.Shape) -> None:
    pi = devices.profile("raspberry-pi-5-8gb")
    form = planner.quantized(shape, "Q8_0")
    one, eight = planner.predict(form, pi, context=512), planner.predict(form, pi, context=512, streams=8)
    assert eight.memory.kv == 8 * one.memory.kv
    assert eight.decode < one.decode < 8 * eight.decode, "together they are faster, each is slower"
    with pytest.raises(DoesNotFit) as caught:
        planner.plan(shape, pi, context=8192, streams=128)
    assert "A context of" in caught.value.hint


def test_predicted_loss_grows_as_types_shrink(shape: planner.Shape) -> None:
    pi = devices.profile("raspberry-pi-5-8gb")
    types = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_0+imatrix", "Q4_0")
    found = [p.kl for p in planner.plan(shape, pi, types=types)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.27, rel=0.1), "as measured on this model"


def test_forms() -> None:
    assert planner.Form.parse("q4_k_m+imatrix").name == "Q4_K_M+imatrix"
    for text, told in {
        "q4_k_m+x": "unknown form",
        "f16+imatrix": "no use",
        "q9": "unknown quantization",
    }.items():
        with pytest.raises(BadInput, match=told):
            planner.Form.parse(text)


def test_unknown_types_suggest_near_ones(shape: planner.Shape) -> None:
    with pytest.raises(BadInput, match="unknown quantization type 'Q4_K'") as caught:
        planner.quantized(shape, "Q4_K")
    assert "Q4_K_M" in caught.value.hint


def test_shape_of_a_checkpoint(tmp_path: Path) -> None:
    shape = planner.shape_of_checkpoint(checkpoint(tmp_path))
    assert shape.parameters == 256 * 64
    assert shape.weight_bytes == 32768
    assert (shape.kv_width, shape.tied) == (32, True)


def test_damaged_checkpoints_are_told(tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    files["model.safetensors"].write_bytes(files["model.safetensors"].read_bytes()[:-1])
    with pytest.raises(InvalidModelFile, match="truncated"):
        planner.shape_of_checkpoint(files)
    with pytest.raises(InvalidModelFile, match=r"config\.json"):
        planner.shape_of_checkpoint(checkpoint(tmp_path, hidden_size="big"))
    with pytest.raises(InvalidModelFile, match=r"no config\.json"):
        planner.shape_of_checkpoint({})


def test_kv_cache_types_count(shape: planner.Shape) -> None:
    f16, q8, q4 = (planner.memory(shape, context=4096, kv_type=t).kv for t in ("f16", "q8_0", "q4_0"))
    assert f16 == 2 * 30 * 192 * 4096 * 2
    assert f16 > 1.8 * q8 > 3.3 * q4


def test_a_bandwidth_starved_device_is_slower(shape: planner.Shape) -> None:
    fast = devices.profile("raspberry-pi-5-8gb")
    slow = replace(fast, bandwidth=fast.bandwidth / 4)
    assert planner.predict(shape, slow).decode < planner.predict(shape, fast).decode
    assert planner.predict(shape, slow).limit == "memory bandwidth"
