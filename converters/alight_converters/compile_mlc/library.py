"""Compile the library of a model: code for one machine, one mode and one context, without the weights."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tvm import relax
from tvm.ir import StringImm

from alight.errors import AlightError, BadInput, EngineError, Unsupported
from alight_converters.compile_mlc.architecture import Architecture, Quantization
from alight_converters.compile_mlc.decoder import Decoder
from alight_converters.compile_mlc.families import architecture_of
from alight_converters.compile_mlc.gpu import pipeline
from alight_converters.compile_mlc.kernels.linear import GROUP
from alight_converters.compile_mlc.kernels.vector import LANES
from alight_converters.compile_mlc.kv_cache import with_our_attention
from alight_converters.compile_mlc.layers import Setting
from alight_converters.compile_mlc.machines import Machine, machine
from alight_converters.compile_mlc.sampling import with_sampling

LIST = "libraries.json"
_CHUNK = 512  # prompt tokens at once, at most
_SEQUENCES = 128  # in a batch, at most: what engines are told
_UNRUN = "unrun: compiled, but never run by alight's tests"


def compile_library(
    config: Mapping[str, Any], quantization: str, target: str, folder: Path, *, context: int
) -> Path:
    """Compile into `folder/lib`; the library and its entry in `libraries.json` appear when they are complete.

    Args:
        config: the content of `mlc-chat-config.json`.
        quantization: q0f16, q0f32, q4f16_1 or q4f32_1.
        target: a name of `machines.MACHINES`, or "native".
        context: tokens that a conversation can have at most.

    Returns:
        The library's file.

    Raises:
        BadInput: an unknown mode or target, or a context of no use. Unsupported: a family or size that cannot be
        compiled. InvalidModelFile: the config lacks something. TargetUnavailable: a linker is missing.
        EngineError: tvm failed.
    """
    mode = Quantization.of(quantization)
    name, chosen = machine(target)
    if context < 8:
        raise BadInput(f"context is {context}", hint="It must be 8 tokens or more.")
    arch = architecture_of(config, context)
    _check_sizes(arch, mode)
    executable, metadata, functions = _built(arch, mode, chosen, context, config)
    place = folder / "lib"
    place.mkdir(parents=True, exist_ok=True)
    library = place / f"{name}{chosen.suffix}"
    with tempfile.TemporaryDirectory(dir=place, prefix=".") as scratch:
        made = Path(scratch) / library.name
        chosen.export(executable, made)
        _sync(made)
        made.replace(library)
        entry = {
            "file": library.name,
            "target": {key: value for key, value in chosen.settings.items() if key != "host"},
            "host": dict(chosen.host),
            "needs": list(chosen.needs),
            "tvm": version("apache-tvm"),
            "quantization": mode.name,
            "context": context,
            "prefill_chunk": metadata["prefill_chunk_size"],
            "functions": functions,
            "run": "" if chosen.tested else _UNRUN,
        }
        _enlist(place / LIST, name, entry, Path(scratch))
    return library


def _built(
    arch: Architecture, mode: Quantization, chosen: Machine, context: int, config: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], list[str]]:
    """The executable, its metadata, and the names of its functions."""
    target = chosen.target
    setting = Setting(mode, target)
    try:
        with target:
            decoder = Decoder(arch, setting)
            module, parameters = decoder.export_tvm(decoder.specification())[:2]
            metadata = _metadata(arch, mode, parameters, context, config)
            if setting.cpu:
                module = with_our_attention(module, arch, setting.dtype)
            module = with_sampling(module, gpu=not setting.cpu, sorting=target.kind.name == "webgpu")
            module = _with_small_functions(module, arch, mode, metadata)
            names = sorted(
                place.name_hint
                for place, function in module.functions_items()
                if isinstance(function, relax.Function)
            )
            executable = relax.build(
                module,
                target=target,
                relax_pipeline="default" if setting.cpu else pipeline(target),
                # A browser finds the functions of a library in the program that it is linked into.
                system_lib=target.kind.name == "webgpu",
            )
    except AlightError:
        raise
    except Exception as error:  # tvm raises whatever its C++ threw
        raise EngineError(
            f"tvm cannot compile this model for {target.kind.name}: {str(error).strip().splitlines()[-1]}",
            hint="Report it with the model's config, or use another format.",
        ) from error
    return executable, metadata, names


def _check_sizes(arch: Architecture, mode: Quantization) -> None:
    """Raises Unsupported for sizes that the kernels do not take."""
    widths = {
        "hidden_size": arch.hidden,
        "intermediate_size": arch.intermediate,
        "num_attention_heads x head_dim": arch.heads * arch.head,
    }
    for what, value in widths.items():
        if mode.four_bits and value % GROUP:
            raise Unsupported(f"{what} is {value}, not a multiple of {GROUP}", hint="Use q0f16 or q0f32.")
    if arch.head % LANES:
        raise Unsupported(f"head_dim is {arch.head}, not a multiple of {LANES}", hint="Use another format.")


def _metadata(
    arch: Architecture, mode: Quantization, parameters: Any, context: int, config: Mapping[str, Any]
) -> dict[str, Any]:
    """What `_metadata` returns, as engines read it (mlc_llm: cpp/metadata/model.cc)."""
    chunk = min(_CHUNK, context, arch.window or context)  # attention inside a chunk knows no window
    wide = max(arch.hidden, 2 * arch.intermediate, (arch.heads + 2 * arch.kv_heads) * arch.head)
    return {
        "model_type": arch.model_type,
        "quantization": mode.name,
        "context_window_size": context,
        "prefill_chunk_size": chunk,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "disaggregation": False,
        "kv_state_kind": "kv_cache",
        "max_batch_size": _SEQUENCES,
        "active_vocab_size": config.get("active_vocab_size") or arch.vocabulary,
        "model_task": "chat",
        "kv_cache": {
            "num_hidden_layers": arch.layers,
            "num_attention_heads": arch.heads,
            "num_key_value_heads": arch.kv_heads,
            "head_dim": arch.head,
        },
        "layer_window": arch.window or 0,  # ours: a cache with windows cannot share beginnings
        # Bytes of intermediate results, estimated; engines add them to weights and cache.
        "memory_usage": {"batch_prefill": 4 * (3 * chunk * wide + arch.vocabulary)},
        "params": [
            {
                "name": arch.mlc_name(name),
                "shape": [int(size) for size in parameter.shape],
                "dtype": str(parameter.dtype),
                "preprocs": [],
                "pipeline_stages": [0],
            }
            for name, parameter in parameters
        ],
    }  # fmt: skip


def _with_small_functions(
    module: Any, arch: Architecture, mode: Quantization, metadata: dict[str, Any]
) -> Any:
    builder = relax.BlockBuilder(module)
    with builder.function("_metadata", params=[]):
        builder.emit_func_output(StringImm(json.dumps(metadata)))
    with builder.function("alloc_embedding_tensor", params=[]):
        shape = relax.ShapeExpr([metadata["prefill_chunk_size"], arch.hidden])
        allocated = relax.op.builtin.alloc_tensor(shape, mode.dtype, runtime_device_index=0)
        builder.emit_func_output(builder.emit(allocated))
    return builder.finalize()


def _enlist(path: Path, name: str, entry: dict[str, Any], scratch: Path) -> None:
    """Add or replace one entry; the list is whole at any time."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    new = scratch / path.name
    new.write_text(json.dumps(known | {name: entry}, indent=2) + "\n", encoding="utf-8")
    _sync(new)
    new.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
