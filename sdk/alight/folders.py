"""A folder where the files of an artifact lie under their own names, for runtimes that read folders.

    $ALIGHT_HOME/models/folders/<hex of the manifest's digest>/

For a model of the store it is made of hard links to blobs when it is first asked for, and goes with the model.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from alight.artifact import Artifact, safe_path
from alight.blobs import disk_full_is_ours, hex_of
from alight.errors import InvalidModelFile, StoreError

_FOLDERS = "folders"  # beside blobs/


def folder_of(artifact: Artifact) -> Path:
    """A folder that holds every file of the artifact under its path inside the model. Read only: a file in it may
    be the store's own.

    Raises:
        InvalidModelFile: the files of a loose model are in no common folder, or have no place in one.
        StoreError: a file of the store is missing, or the store cannot be written. DiskFull: no room for copies.
    """
    if not artifact.files:
        raise InvalidModelFile(f"{artifact.name!r} has no files")
    if not artifact.digest:
        return _common_folder(artifact)
    folder = _root_of(artifact) / _FOLDERS / hex_of(artifact.digest)
    return folder if _is_whole(folder, artifact) else _make(folder, artifact)


def sweep(root: Path, kept: Collection[str]) -> None:
    """Remove the folders of models that are gone, and what killed makers left. Whoever calls it holds the store's
    lock.

    Args:
        root: of the store. kept: digests of the manifests that are still named.
    """
    names = {hex_of(digest) for digest in kept}
    folders = root / _FOLDERS
    for folder in folders.iterdir() if folders.is_dir() else ():
        if folder.name not in names:
            shutil.rmtree(folder, ignore_errors=True)


def _common_folder(artifact: Artifact) -> Path:
    inside, file = next(iter(artifact.files.items()))
    folder = file.parents[len(Path(inside).parts) - 1]
    apart = [path for path, at in artifact.files.items() if at != folder / path]
    if apart:
        raise InvalidModelFile(
            f"{apart[0]} of {artifact.name!r} is not in {folder}", hint="Put the model's files in one folder."
        )
    return folder


def _root_of(artifact: Artifact) -> Path:
    return next(iter(artifact.files.values())).parents[2]  # <root>/blobs/sha256/<hex>


def _is_whole(folder: Path, artifact: Artifact) -> bool:
    """It appears in one step; but a person may have deleted something in it since."""
    try:
        return all((folder / x.path).stat().st_size == x.size for x in artifact.layers)
    except OSError:
        return False


def _make(folder: Path, artifact: Artifact) -> Path:
    from filelock import FileLock  # only where something is to be made

    part = folder.with_name(f".{secrets.token_hex(8)}")
    try:
        with disk_full_is_ours(folder), FileLock(_root_of(artifact) / "lock"):
            if _is_whole(folder, artifact):  # another process was quicker
                return folder
            try:
                _lay_out(artifact.files, part)
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except FileNotFoundError as error:
        raise StoreError(
            f"a file of {artifact.name!r} is missing: {error.filename}",
            hint=f"`alight rm {artifact.name}` and bring it again.",
        ) from error
    except PermissionError as error:
        raise StoreError(
            f"cannot lay out the files of {artifact.name!r}: {error}", hint="The store must be writable."
        ) from error
    return folder


def _lay_out(files: Mapping[str, Path], folder: Path) -> None:
    for path, blob in files.items():
        target = folder / safe_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _place(blob, target)


def _place(blob: Path, target: Path) -> None:
    """A hard link; a symbolic one where the system has none (Android), a copy where it has neither (FAT)."""
    blob.stat()  # a symbolic link to nothing would be made without a word
    with suppress(OSError, NotImplementedError):
        os.link(blob, target)
        return
    with suppress(OSError, NotImplementedError):
        target.symlink_to(os.path.relpath(blob, target.parent))
        return
    shutil.copyfile(blob, target)
    with target.open("rb") as copy:
        os.fsync(copy.fileno())
