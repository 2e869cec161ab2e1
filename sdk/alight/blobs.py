"""Files by their digest: how the store takes them in, and receives them from elsewhere."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from alight.errors import BadInput, DigestMismatch, DiskFull, StoreError

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHUNK = 1 << 20
_KEPT = 24 * 3600.0  # seconds that an uploaded blob waits for a model that needs it

Report = Callable[[int], None]  # bytes done


class Blobs:
    """The blobs of an OCI layout. Reading needs no lock; `prepare`, `take`, `put`, `adopt` and `replace` are
    called by whoever holds the store's.

    Args:
        root: the layout's folder. In it are blobs/sha256/<hex>, and of ours tmp/ and uploads/<hex>: what was
            uploaded and no model needs yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "blobs" / "sha256"
        self._tmp = root / "tmp"
        self._uploads = root / "uploads"

    def path(self, digest: str) -> Path:
        """Where a blob is (or would be). The digest is checked for its form."""
        return self.folder / hex_of(digest)

    def find(self, digest: str) -> Path | None:
        """Where a blob is, of a model or uploaded; None where there is none."""
        places = (self.path(digest), self._uploads / hex_of(digest))
        return next((path for path in places if path.exists()), None)

    def prepare(self) -> None:
        """Make the folders, and drop what dead writers left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tmp.mkdir(exist_ok=True)
        for stale in self._tmp.iterdir():  # writers hold the lock, so whoever left these is dead
            stale.unlink()
        for upload in self._uploads.iterdir() if self._uploads.exists() else ():
            with suppress(FileNotFoundError):  # they hold no lock, and finish when they like
                if upload.stat().st_mtime < time.time() - _KEPT:
                    upload.unlink()

    def take(self, file: Path, *, move: bool, promised: str | None, report: Report | None) -> tuple[str, int]:
        """Put one file among the blobs; returns its digest and size.

        Raises:
            DigestMismatch: it is not what was promised. DiskFull: there is no room for a copy.
        """
        total = file.stat().st_size
        if not move:
            check_room(self.root, total)
        temporary = self._tmp / secrets.token_hex(8)
        try:
            if move:
                digest = hash_file(file, report=report)
            else:
                with file.open("rb") as source, temporary.open("wb") as out:
                    digest = _hash(source, out, report)
                    _sync(out)
            if promised and digest != promised:
                raise DigestMismatch(
                    f"{file.name} has digest {digest}, but {promised} was promised",
                    hint="Fetch it again; nothing was added.",
                )
            blob = self.path(digest)
            if move and not blob.exists():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
                try:
                    file.rename(blob)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    shutil.copyfile(file, temporary)
                    temporary.rename(blob)
            elif not move:
                temporary.rename(blob)
            blob.chmod(0o444)
            _sync_folder(self.folder)
            return digest, total
        finally:
            temporary.unlink(missing_ok=True)

    def put(self, data: bytes) -> tuple[str, int]:
        """Keep some bytes; returns their digest and size."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.replace(self.path(digest), data)
        return digest, len(data)

    def replace(self, path: Path, data: bytes) -> None:
        """Write a small file of the layout so that it is either old or new, whatever happens."""
        temporary = self._tmp / secrets.token_hex(8)
        with temporary.open("wb") as out:
            out.write(data)
            _sync(out)
        temporary.rename(path)
        _sync_folder(path.parent)

    def upload(self, digest: str, size: int) -> Upload:
        """See `Store.upload`."""
        self._uploads.mkdir(parents=True, exist_ok=True)
        check_room(self.root, size)
        return Upload(self._uploads, digest)

    def adopt(self, digest: str) -> None:
        """Make sure that a blob is among those of models: an upload moves there. It was checked when it came.

        Raises:
            StoreError: it is not here.
        """
        blob, upload = self.path(digest), self._uploads / hex_of(digest)
        if not blob.exists():
            try:
                upload.rename(blob)
            except FileNotFoundError:
                raise StoreError(f"there is no blob {digest}", hint="Upload it (again).") from None
            blob.chmod(0o444)
            _sync_folder(self.folder)


class Upload:
    """A blob on its way in, written piece by piece. Use it in a `with` block: what is not finished is dropped.

    Args:
        folder: exists; where it goes once it is complete, under the hexadecimal part of its digest.
        digest: what its bytes promise to be.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.digest = digest
        self._target = folder / hex_of(digest)
        self._partial = folder / f"{secrets.token_hex(8)}.part"
        self._hasher = hashlib.sha256()
        self._file = self._partial.open("wb")

    def write(self, data: bytes) -> None:
        """Take the next piece.

        Raises:
            DiskFull: there is no room for it.
        """
        with disk_full_is_ours(self._partial):
            self._file.write(data)
        self._hasher.update(data)

    def finish(self) -> None:
        """Check what came and put it in place, in one step.

        Raises:
            DigestMismatch: it is not what was promised; nothing is kept.
        """
        got = "sha256:" + self._hasher.hexdigest()
        if got != self.digest:
            raise DigestMismatch(
                f'digest mismatch, expected "{self.digest}", got "{got}"', hint="Send it again."
            )
        with disk_full_is_ours(self._partial):
            _sync(self._file)
        self._file.close()
        self._partial.replace(self._target)
        _sync_folder(self._target.parent)

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # flushes what is left, for which there may be no room
        except OSError:
            if error is None:
                raise
        finally:
            self._partial.unlink(missing_ok=True)


def hex_of(digest: str) -> str:
    """The file name of a blob.

    Raises:
        BadInput: it does not have the form of a digest.
    """
    if not DIGEST.fullmatch(digest):
        raise BadInput(
            f"{digest!r} is not a sha256 digest", hint="Write it as sha256: and 64 lower-case digits."
        )
    return digest.removeprefix("sha256:")


def check_room(folder: Path, size: int) -> None:
    """Raises DiskFull where so many bytes do not fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DiskFull(folder, size, free)


def hash_file(path: Path, *, report: Report | None = None) -> str:
    """The sha256 digest of a file."""
    with path.open("rb") as source:
        return _hash(source, None, report)


def _hash(source: BinaryIO, copy_to: BinaryIO | None, report: Report | None) -> str:
    """The sha256 digest of what a stream holds, copied on the way where that is wanted."""
    hasher, done = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        hasher.update(chunk)
        if copy_to:
            copy_to.write(chunk)
        done += len(chunk)
        if report:
            report(done)
    return "sha256:" + hasher.hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def disk_full_is_ours(path: Path) -> Iterator[None]:
    """A full disk as an error of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path) from error
        raise
