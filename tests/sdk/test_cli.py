"""The verbs that end by themselves, run as real processes."""

from __future__ import annotations

import json
import os
import pkgutil
import secrets
import socket
import subprocess
from pathlib import Path

import pytest
from gguf_writer import tiny
from test_cli_support import COMMAND, LIMIT, alight, environment, fails, ok

from alight import cli
from alight.cli import VERBS
from alight.preset import PRESET, Preset
from alight.store import Store

SIZE = len(tiny())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny-Model-Q8_0.gguf"
    path.write_bytes(tiny())
    return path


@pytest.fixture
def pulled(file: Path) -> str:
    ok("pull", file, "--name", "tiny")
    return "tiny"


def shipped() -> list[str]:
    """The verbs of this installation."""
    modules = {module.name for module in pkgutil.iter_modules(cli.__path__)}
    return [verb for verbs in VERBS.values() for verb, module in verbs.items() if module in modules]


# -- help and usage --------------------------------------------------------------------------------


def test_help_names_every_verb() -> None:
    bare, asked = ok(), ok("--help")
    for verb in shipped():
        assert f" {verb} " in bare
        assert f" {verb} " in asked


@pytest.mark.parametrize("verb", shipped())
def test_every_verb_has_an_example(verb: str) -> None:
    assert f"Example: alight {verb}" in ok(verb, "--help")


def test_version() -> None:
    assert ok("--version") == "alight 0.1.0\n"


def test_wrong_usage_is_exit_code_2() -> None:
    assert "Did you mean 'list'" in fails("lst", code=2)
    assert "--frob" in fails("list", "--frob", code=2)
    assert "Missing argument" in fails("pull", code=2)
    assert "--port" in fails("serve", "--port", "99999", code=2)


def test_the_shell_completes_model_names(pulled: str) -> None:
    done = alight(_ALIGHT_COMPLETE="complete_bash", COMP_WORDS="alight show ti", COMP_CWORD="2")
    assert done.stdout.split() == ["tiny"]


# -- the store -------------------------------------------------------------------------------------


def test_pull_a_file(file: Path) -> None:
    assert ok("pull", file) == f"tiny-model: 64 parameters, gguf unknown, {SIZE} B\n"
    assert ok("pull", file, "--name", "other:v1").startswith("other:v1: ")
    about = json.loads(ok("pull", file, "--json"))
    assert about["name"] == "tiny-model"
    assert about["parameters"] == 64
    assert about["digest"].startswith("sha256:")
    assert Store().names() == ["other:v1", "tiny-model:latest"]


def test_pull_what_cannot_be(file: Path, tmp_path: Path) -> None:
    fails("pull", tmp_path / "nothing.gguf")
    assert "known source" in fails("pull", "ftp://host/model")
    assert "not a model name" in fails("pull", file, "--name", "a b")
    file.write_bytes(tiny()[:-100])
    assert "truncated" in fails("pull", file)
    assert Store().names() == []


def test_list(pulled: str, file: Path) -> None:
    ok("pull", file, "--name", "a-team/" + "long-name-" * 5 + "x")
    lines = ok("list").splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "FORMAT", "QUANT", "PARAMS", "MODIFIED"]
    assert lines[-1].split()[:4] == ["tiny", str(SIZE), "B", "gguf"]
    assert all(len(line) <= 80 for line in lines)
    assert "\x1b" not in "".join(lines)
    models = json.loads(ok("list", "--json"))
    assert [m["name"] for m in models] == ["a-team/" + "long-name-" * 5 + "x", "tiny"]


def test_list_nothing() -> None:
    done = alight("list")
    assert (done.returncode, done.stdout) == (0, "")
    assert "alight pull" in done.stderr
    assert json.loads(ok("list", "--json")) == []


def test_show(pulled: str) -> None:
    text = ok("show", pulled)
    assert Store().get(pulled).digest in text  # whole, to be copied
    assert "llama" in text
    about = json.loads(ok("show", pulled, "--json"))
    assert about["chat_template"] is False
    assert about["report"] is None
    (only,) = about["files"]
    assert Path(only["file"]).read_bytes() == tiny()


@pytest.mark.parametrize("verb", ["show", "rm", "verify", "run", "serve"])
def test_an_unknown_model_suggests_near_ones(verb: str, pulled: str) -> None:
    assert "Did you mean tiny?" in fails(verb, "tinny", *(["hello"] if verb == "run" else []))


def test_rm(pulled: str, file: Path) -> None:
    for name in ("second", "third"):
        ok("pull", file, "--name", name)
    fails("rm", "second", "nothing")
    assert len(Store().names()) == 3  # a wrong name removes nothing
    freed = ok("rm", "second", "third").splitlines()
    assert [line.split(",")[0] for line in freed] == ["removed second", "removed third"]
    assert ok("verify", "tiny") == "1 model: all files are intact\n"


def test_verify(pulled: str) -> None:
    assert json.loads(ok("verify", "--json")) == {"models": 1, "problems": []}
    (weights,) = Store().get(pulled).weights
    weights.chmod(0o600)
    weights.write_bytes(tiny()[:-1] + b"x")
    done = alight("verify")
    assert done.returncode == 1
    assert "content differs from its digest" in done.stdout
    done = alight("verify", pulled, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"][0]["model"] == "tiny:latest"


# -- devices ---------------------------------------------------------------------------------------


def test_probe() -> None:
    device = json.loads(ok("probe", "--json"))
    assert device["id"] == "this"
    assert device["bandwidth"] > 0
    assert "memory" in ok("probe")


def test_probe_lists_the_known_boards() -> None:
    lines = ok("probe", "--list").splitlines()
    assert any(line.startswith("raspberry-pi-5-8gb ") for line in lines)
    assert all(len(line) <= 80 for line in lines)
    assert "raspberry-pi-5-8gb" in [board["id"] for board in json.loads(ok("probe", "--list", "--json"))]


def test_devices() -> None:
    from alight.lan.discovery import advertise

    name = f"Test-{secrets.token_hex(4)}"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with advertise(name, port, host="127.0.0.1"):
            found = json.loads(ok("devices", "--json", "--timeout", "4"))
            assert {"name": name, "port": port}.items() <= next(p for p in found if p["name"] == name).items()
            assert name in ok("devices", "--timeout", "4")


# -- run -------------------------------------------------------------------------------------------


def test_run_a_prompt(pulled: str, file: Path) -> None:
    assert ok("run", pulled, "hello 世界", "--target", "echo") == "hello 世界\n"
    assert ok("run", file, "as it lies", "--target", "echo") == "as it lies\n"
    assert Store().names() == ["tiny:latest"]
    assert ok("run", pulled, "hello", "--target", "echo", "--max-tokens", "2") == "he\n"


def test_run_honours_what_is_set_for_a_model(pulled: str) -> None:
    store = Store()
    base = store.get(pulled)
    preset = Preset(
        system="be brief",
        template="{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}",
        parameters={"num_predict": 60, "stop": [";assistant"]},
        messages=[{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}],
    )
    store.compose("made", base.layers, base.description, small={PRESET: preset.to_bytes()})
    said = ok("run", "made", "hello", "--target", "echo")
    assert said == "system: be brief;user: 1+1?\n"  # up to its stop text
    said = ok("run", "made", "hello", "--target", "echo", "--system", "sing", "--max-tokens", "12")
    assert said == "system: sing\n"


def test_run_reads_a_pipe(pulled: str) -> None:
    assert ok("run", pulled, "--target", "echo", stdin="from a pipe") == "from a pipe\n"


def test_run_tells_its_speed(pulled: str) -> None:
    done = alight("run", pulled, "hello", "--target", "echo", "--stats")
    assert done.stdout == "hello\n"
    assert "5 tokens read" in done.stderr


def test_run_refuses(pulled: str) -> None:
    assert "empty" in fails("run", pulled, " ", "--target", "echo")
    assert "empty" in fails("run", pulled, "--target", "echo")  # an empty pipe
    assert "'ecco'" in fails("run", pulled, "x", "--target", "ecco")
    assert "temperature" in fails("run", pulled, "x", "--target", "echo", "--temperature", "101")
    assert "the context holds 8" in fails("run", pulled, "long prompt", "--target", "echo", "--context", "8")


def test_run_a_real_model(smollm2_file: Path) -> None:
    ask = ("run", smollm2_file, "Say hello.", "--temperature", "0", "--max-tokens", "8", "--context", "512")
    assert len(ok(*ask)) > 5
    assert ok(*ask, "--system", "Answer in capitals.") != ok(*ask)


# -- when something is wrong -----------------------------------------------------------------------


def test_the_traceback_is_kept_on_request(pulled: str) -> None:
    for done in (alight("--debug", "show", "tinny"), alight("show", "tinny", ALIGHT_DEBUG="1")):
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert "Did you mean tiny?" in done.stderr


@pytest.fixture
def broken_target(tmp_path: Path) -> str:
    """Somebody's target that is installed and fails; gives its PYTHONPATH."""
    package = tmp_path / "plugins"
    about = package / "broken-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[alight.targets]\nbroken = broken:BrokenTarget\n")
    (package / "broken.py").write_text(
        "from alight.testing import EchoTarget\n"
        "class BrokenTarget(EchoTarget):\n"
        "    def load(self, artifact, options):\n"
        "        return 1 / 0\n"
    )
    return str(package)


def test_a_bug_is_one_line(pulled: str, broken_target: str) -> None:
    ask = ("run", pulled, "hello", "--target", "broken")
    text = fails(*ask, PYTHONPATH=broken_target)
    assert "ZeroDivisionError" in text
    assert "--debug" in text
    assert "Traceback" in alight("--debug", *ask, PYTHONPATH=broken_target).stderr


def test_a_home_that_is_a_file(file: Path) -> None:
    assert str(file) in fails("pull", file, ALIGHT_HOME=str(file))


def test_a_reader_that_has_enough(pulled: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*COMMAND, "list", "--json"]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=environment(), timeout=LIMIT, check=False
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 1
