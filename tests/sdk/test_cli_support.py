"""Run the real command: as a process with pipes, and as a process in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

LIMIT = 60.0  # seconds; generous, for busy machines: no test measures time
COMMAND = [sys.executable, "-m", "alight"]
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[()][A-Z0-9]|[=>78]|\][^\x07]*\x07)")


def environment(**extra: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("ALIGHT_") or k == "ALIGHT_HOME"}
    return {**plain, "COLUMNS": "80", "PYTHONUNBUFFERED": "1", **extra}


def alight(*args: str | Path, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=environment(**extra),
        check=False,
    )


def ok(*args: str | Path, **options: Any) -> str:
    """The output of a verb that must succeed."""
    done = alight(*args, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(*args: str | Path, code: int = 1, **options: Any) -> str:
    """The error output of a verb that must fail: short, and without a traceback."""
    done = alight(*args, **options)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) <= 3
    return done.stderr


class Terminal:
    """A verb in a pseudo-terminal of 80 columns."""

    def __init__(self, *args: str | Path, **extra: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, args)],
            preexec_fn=lambda: os.login_tty(slave),  # so that Ctrl-C is a signal
            pass_fds=[slave],
            env=environment(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", **extra),
        )
        os.close(slave)
        self.seen = ""  # since the last read_until

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, text: str) -> str:
        """What was shown up to and including `text`, without escape sequences."""
        deadline = time.monotonic() + LIMIT
        while text not in (plain := _ESCAPES.sub("", self.seen)):
            assert self._read(deadline), f"{text!r} did not come, but {plain!r}"
        shown, _, rest = plain.partition(text)
        self.seen = rest
        return shown + text

    def end(self) -> int:
        """Wait for the end of the process; gives its exit code."""
        deadline = time.monotonic() + LIMIT
        while self._read(deadline):
            pass
        return self.process.wait(LIMIT)

    def rest(self) -> str:
        return _ESCAPES.sub("", self.seen)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux says so when the other side is closed
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)


def _first_line(descriptor: int) -> str:
    """Read no further: what a buffer would take along, `communicate` would never see."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line.decode()


class Serving:
    """`alight serve` as a process, until the block ends. `url` is where it answers."""

    def __init__(self, *args: str | Path, **extra: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "serve", "--port", "0", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**extra),
        )
        assert self.process.stdout and self.process.stderr
        line = _first_line(self.process.stdout.fileno())
        assert "http://" in line, self.process.stderr.read()
        self.url = "http://" + line.split("http://")[1].split()[0]

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        """Send a signal and wait; gives the exit code and what it had still to say."""
        self.process.send_signal(number)
        out, errors = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, out, errors
