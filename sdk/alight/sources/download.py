"""Downloads of files that resume after a cut or a kill, and are checked before they count as there.

While it arrives, a file is a `.part` named by its promised digest: a new commit that leaves the weights as
they are does not lose what was downloaded. A finished file is checked, synced to disk and renamed into place,
so a file that has its final name is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alight.errors import DigestMismatch, DiskFull, SourceError, StoreError
from alight.sources.fetched import Progress
from alight.sources.web import HubClient, Transient

if TYPE_CHECKING:
    import httpx

_PROGRESS_WORTH_A_RETRY = 1 << 20  # bytes; a connection that brought less counts as a failure
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on a hub, as its listing promises it.

    Attributes:
        path: its name in the repository. Untrusted.
        url: where to download it.
        size: in bytes, when promised.
        sha256: hex digest of the content, when promised.
        git_sha1: hex id of the content as a git blob, when promised.
    """

    path: str
    url: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def promise(self) -> str | None:
        """The promised digest, of either kind."""
        return self.sha256 or self.git_sha1

    @property
    def part_name(self) -> str:
        """File name of its partial download: the same for the same content."""
        identity = f"{self.promise or self.url} {self.path}"
        return hashlib.sha256(identity.encode()).hexdigest()[:32] + ".part"


def safe_path(name: str) -> str:
    """`name`, if it stays inside the folder it is put in, on every operating system.

    Raises:
        SourceError: it is absolute, climbs out, or has a backslash, a colon or a control character.
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or re.search(r"[\\:\x00-\x1f]", name):
        raise SourceError(
            f"the file name {name!r} is refused: it could reach outside the model's folder",
            hint="Do not trust this repository.",
        )
    return name


def check_space(files: list[tuple[RemoteFile, Path]], parts: Path) -> None:
    """See that the disk has room for what is still to come.

    Args:
        files: each with its final path.
        parts: the folder of partial downloads.

    Raises:
        DiskFull: it has not.
    """
    needed = sum(
        max(0, (file.size or 0) - _size(parts / file.part_name))
        for file, target in files
        if not target.exists()
    )
    free = shutil.disk_usage(parts).free
    if needed > free:
        raise DiskFull(parts, needed, free)


def download(file: RemoteFile, target: Path, parts: Path, client: HubClient, progress: Progress) -> None:
    """Bring `file` to `target`, going on from what an earlier try left in the folder `parts`.

    Raises:
        DigestMismatch: the content is not what the hub promised; it is deleted.
        DiskFull: the disk filled up; what was downloaded is kept.
        NetworkError: the connection failed too often; what was downloaded is kept.
        SourceError: the hub refused.
        StoreError: the disk failed.
    """
    part = parts / file.part_name
    with _disk_errors(target, file.size):
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.promise is None:
            # Without a digest nothing would show a mixture of two versions: never go on with an old part.
            part.unlink(missing_ok=True)
        elif target.exists():  # finished by an earlier fetch, but never taken away
            with contextlib.suppress(DigestMismatch):
                _check(target, file, progress)
                return
        _receive(file, part, client, progress)
        _check(part, file, progress)
        with part.open("rb+") as content:
            os.fsync(content.fileno())
        part.replace(target)


def _receive(file: RemoteFile, part: Path, client: HubClient, progress: Progress) -> None:
    """Write the whole file to `part`, over as many connections as it takes."""
    retries = client.retries()
    furthest = _size(part)
    while True:
        part.touch()
        have = _size(part)
        if have == file.size:  # no request for an empty file either: not every hub answers one
            return
        if file.size is not None and have > file.size:
            part.unlink()
            continue
        try:
            _receive_more(file, part, have, client, progress)
            if file.size is None:
                return
            if _size(part) < file.size:
                raise Transient(f"{client.host} ended {file.path} early")
        except Transient as error:
            if _size(part) - furthest >= _PROGRESS_WORTH_A_RETRY:
                furthest = _size(part)
                retries.progressed()
            retries.failed(error)


def _receive_more(file: RemoteFile, part: Path, have: int, client: HubClient, progress: Progress) -> None:
    """One connection: append to `part`, or begin it anew when the server sends the whole file."""
    headers = {"Accept-Encoding": "identity"}  # the promised size and digest are of the plain bytes
    if have:
        headers["Range"] = f"bytes={have}-"
    with client.get(file.url, headers=headers) as response:
        if response.status_code == 416:  # the hub's file ends here
            if file.size is None:
                return
            part.unlink()
            raise _mismatch(file, f"{file.size} bytes", f"{have}")
        client.check(response, file.path)
        done = _first_byte(response)
        if done not in (0, have):
            raise Transient(f"{client.host} sent another range of {file.path} than asked for")
        total = file.size or 0
        with part.open("rb+") as output:
            output.truncate(done)
            output.seek(done)
            progress(file.path, done, total)
            for chunk in response.iter_raw():
                output.write(chunk)
                done += len(chunk)
                if file.size is not None and done > file.size:
                    output.truncate(0)
                    raise _mismatch(file, f"{file.size} bytes", "more")
                progress(file.path, done, total)


def _first_byte(response: httpx.Response) -> int:
    """Where in the file the body begins.

    Content-Range decides, not the status: ModelScope answers a range with 200, and a server that ignores
    ranges sends the whole file, also with 200.
    """
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if match is None and response.status_code == 206:
        raise Transient("a partial answer without Content-Range")
    return int(match[1]) if match else 0


def _check(path: Path, file: RemoteFile, progress: Progress) -> None:
    """Compare the bytes on disk with what the hub promised; delete them when they differ."""
    size = _size(path)
    if file.size is not None and size != file.size:
        path.unlink()
        raise _mismatch(file, f"{file.size} bytes", f"{size}")
    if file.promise is not None:
        # Git hashes a file behind a header; the promise of a sha256 is of the plain file.
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as content:
            while block := content.read(_HASH_BLOCK):
                digest.update(block)
                progress(file.path, size, size)  # a sign of life, and a chance to stop
        if digest.hexdigest() != file.promise:
            path.unlink()
            raise _mismatch(file, f"digest {file.promise}", digest.hexdigest())
    progress(file.path, size, size)


def _mismatch(file: RemoteFile, promised: str, got: str) -> DigestMismatch:
    return DigestMismatch(
        f"{file.path} is not what its hub promised: {promised} expected, got {got}",
        hint="It was deleted. Run the command again; if this repeats, do not trust the source.",
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def _disk_errors(target: Path, needed: int | None) -> Iterator[None]:
    """A full or failing disk as alight's errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free if target.parent.exists() else 0
            raise DiskFull(target.parent, needed, free) from error
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
