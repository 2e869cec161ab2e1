"""What Hugging Face and ModelScope have in common: an address, a list of files, and the pull."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from alight import paths
from alight.errors import BadInput, SourceError, StoreError
from alight.sources import choose
from alight.sources.download import RemoteFile, check_space, download, safe_path
from alight.sources.fetched import Fetched, Progress, short_name
from alight.sources.web import HubClient

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(
    r"(?P<scheme>[a-z]+)://(?P<organisation>[\w.-]+)/(?P<name>[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>.+))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Address:
    """`scheme://organisation/name[@revision][:file]`; of a data set, `scheme://datasets/organisation/…`.

    Attributes:
        kind: "model" or "dataset".
    """

    scheme: str
    id: str
    revision: str | None
    file: str | None
    kind: str = "model"

    @classmethod
    def parse(cls, source: str) -> Address:
        """Take a source apart.

        Raises:
            BadInput: it has another form.
        """
        match = _ADDRESS.fullmatch(source)
        if match is None or {match["organisation"], match["name"]} & {".", ".."}:
            scheme, _, rest = source.partition("://")
            form = f"{scheme}://organisation/name[@revision][:file]"
            parts = rest.split("/", 2)
            meant = f"; did you mean {scheme}://{parts[0]}/{parts[1]}:{parts[2]}?" if len(parts) == 3 else ""
            raise BadInput(f"{source!r} is no address of a model", hint=f"Write it as {form}{meant}")
        return cls(
            match["scheme"], f"{match['organisation']}/{match['name']}", match["revision"], match["file"]
        )

    @classmethod
    def of_dataset(cls, source: str) -> Address:
        """Take the source of a data set apart.

        Raises:
            BadInput: it has another form.
        """
        scheme, datasets, rest = source.partition("://datasets/")
        match = _ADDRESS.fullmatch(f"{scheme}://{rest}") if datasets else None
        if match is None or {match["organisation"], match["name"]} & {".", ".."}:
            raise BadInput(
                f"{source!r} is no address of a data set",
                hint=f"Write it as {scheme or 'hf'}://datasets/organisation/name[@revision][:file].",
            )
        id = f"{match['organisation']}/{match['name']}"
        return cls(scheme, id, match["revision"], match["file"], "dataset")

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        datasets = "datasets/" if self.kind == "dataset" else ""
        return f"{self.scheme}://{datasets}{self.id}{revision}"

    @property
    def folder(self) -> Path:
        """Where its downloads are kept; one folder for all revisions, which share unfinished files."""
        datasets = "datasets--" if self.kind == "dataset" else ""
        return paths.home() / "downloads" / f"{self.scheme}--{datasets}{self.id.replace('/', '--')}"


@dataclass(frozen=True, slots=True)
class Repository:
    """A hub's listing of a model repository.

    Attributes:
        commit: the commit that the listing is of, or the revision when the hub does not tell it.
        files: by path.
        licence: as the hub states it.
    """

    commit: str
    files: dict[str, RemoteFile]
    licence: str | None


class _Held(threading.local):
    def __init__(self) -> None:
        self.folders: set[Path] = set()


# FileLock's own nesting (is_singleton) lets threads wait for each other forever in older filelocks (3.13).
_held_by_this_thread = _Held()


@contextlib.contextmanager
def exclusive(address: Address) -> Iterator[None]:
    """Hold an address for this thread alone; waits for others. May be nested.

    Raises:
        StoreError: the downloads folder cannot be written.
    """
    from filelock import FileLock, Timeout

    held = _held_by_this_thread.folders
    folder = address.folder
    if folder in held:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s is being downloaded by another process or thread; waiting for it", address)
            lock.acquire()
    except OSError as error:
        raise StoreError(
            f"cannot write to {folder}: {error.strerror or error}",
            hint="Set ALIGHT_HOME to a folder you can write to.",
        ) from error
    held.add(folder)
    try:
        yield
    finally:
        held.remove(folder)
        lock.release()


def pull(address: Address, repository: Repository, client: HubClient, progress: Progress) -> Fetched:
    """Choose the files of a model and download them. Call it while holding `exclusive(address)`.

    Raises:
        SourceError, DigestMismatch, DiskFull, StoreError: see `alight.sources.fetch`.
    """
    finished = folder_of(address, repository)

    def bring(names: list[str]) -> None:
        download_all(names, address, repository, client, progress)

    def open_index(name: str) -> Path:
        bring([name])
        return finished / name

    choice = choose.choose(repository.files, address.file, str(address), open_index)
    bring(choice.paths)

    # A GGUF is one file, or parts that belong side by side: the hub's folders mean nothing for it.
    gguf = choice.format == "gguf"
    inside = {name: PurePosixPath(name).name if gguf else name for name in choice.paths}
    source = f"{address.scheme}://{address.id}@{repository.commit}"
    return Fetched(
        files={inside[name]: finished / name for name in choice.paths},
        format=choice.format,
        source=f"{source}:{choice.paths[0]}" if gguf else source,
        name=short_name(address.id.partition("/")[2]),
        licence=repository.licence,
        temporary=True,
        digests={
            inside[name]: f"sha256:{sha256}"
            for name in choice.paths
            if (sha256 := repository.files[name].sha256)
        },
    )


def folder_of(address: Address, repository: Repository) -> Path:
    """Where the files of one commit are, once they are complete; of a data set, those that were asked for."""
    what = (
        f"{repository.commit}-{address.file}"
        if address.kind == "dataset" and address.file
        else repository.commit
    )
    # The commit is the hub's word: only what is safe in a folder name is kept of it.
    return address.folder / ("at-" + re.sub(r"[^\w-]", "-", what))


def download_all(
    names: Iterable[str], address: Address, repository: Repository, client: HubClient, progress: Progress
) -> None:
    """Bring these files to `folder_of`. Call it while holding `exclusive(address)`."""
    finished = folder_of(address, repository)
    wanted = [(repository.files[name], finished / safe_path(name)) for name in names]
    check_space(wanted, address.folder)
    for file, target in wanted:
        download(file, target, address.folder, client, progress)


@contextlib.contextmanager
def understanding(client: HubClient, address: Address) -> Iterator[None]:
    """While a hub's answer is read: a shape that it should not have becomes an error for the user.

    Raises:
        SourceError: the answer has another shape.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{client.host} did not describe {address} as its API promises: {error!r}"
        ) from error


def promised_digest(value: object, length: int, what: str) -> str | None:
    """A hex digest out of a hub's answer, or None where it has none.

    Raises:
        SourceError: there is something else in its place.
    """
    if not value:
        return None
    if isinstance(value, str) and re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", value):
        return value.lower()
    raise SourceError(f"the hub's digest of {what} is not one: {value!r}")


def promised_size(value: object, what: str) -> int | None:
    """A file size out of a hub's answer, or None where it has none.

    Raises:
        SourceError: there is something else in its place.
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise SourceError(f"the hub's size of {what} is not one: {value!r}")
