"""The model store: an OCI image layout on disk that standard tools can read.

    $ALIGHT_HOME/models/
        oci-layout  index.json  blobs/sha256/<hex>     (the OCI image layout)
        tmp/  lock                                     (ours)

Nothing half-written is ever visible: a blob is written to tmp/, synced, then renamed; index.json is
replaced the same way, and it names a model only after all its blobs are in place. One file lock guards
changes; readers need none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from alight import paths
from alight.artifact import (
    INDEX,
    LINEAGE,
    MANIFEST,
    Artifact,
    Description,
    Layer,
    canonical,
    digest_of,
    manifest_json,
    media_type,
    parse_layers,
    safe_path,
)
from alight.errors import BadInput, DigestMismatch, DiskFull, ModelNotFound, StoreError

log = logging.getLogger(__name__)

REF = "org.opencontainers.image.ref.name"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*(?::[\w][\w.-]{0,127})?")
_CHUNK = 1 << 20

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Problem:
    """Something `verify` found wrong."""

    model: str
    path: str
    what: str


def normal_name(name: str) -> str:
    """A model name in its full form: lower case, with a tag ("smollm2" -> "smollm2:latest")."""
    full = name.casefold()
    if ":" not in full.rsplit("/", 1)[-1]:
        full += ":latest"
    if len(full) > 255 or not _NAME.fullmatch(full):
        raise BadInput(
            f"{name!r} is not a model name",
            hint="Use letters, digits, '.', '_', '-' and '/', with an optional ':tag', such as smollm2:q8.",
        )
    return full


class Store:
    """Models on this disk, by name.

    Args:
        root: the layout's folder; by default `$ALIGHT_HOME/models`. Created when first written to.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root) if root is not None else paths.home() / "models"
        self.blobs = self.root / "blobs" / "sha256"
        self._index = self.root / "index.json"
        self._tmp = self.root / "tmp"

    # -- reading ---------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The full names of all models, sorted."""
        return sorted(self._refs())

    def artifacts(self) -> list[Artifact]:
        """All models that can be read, by name. A damaged one is logged and left out."""
        found = []
        for name in self.names():
            try:
                found.append(self.get(name))
            except StoreError as error:
                log.warning("%s", error)
        return found

    def get(self, name: str) -> Artifact:
        """A model by name ("smollm2", "smollm2:q8") or by digest ("sha256:…").

        Raises:
            ModelNotFound: with the nearest names. StoreError: its manifest is missing or damaged.
        """
        refs = self._refs()
        if DIGEST.fullmatch(name):
            named = [n for n, d in refs.items() if d == name]
            if not named:
                raise ModelNotFound(name, refs)
            return self._read(named[0], name)
        full = normal_name(name)
        if full not in refs:
            raise ModelNotFound(name, [short_name(n) for n in refs])
        return self._read(full, refs[full])

    def __contains__(self, name: str) -> bool:
        try:
            return normal_name(name) in self._refs()
        except BadInput:
            return False

    def blob(self, digest: str) -> Path:
        """Where a blob is (or would be). The digest is checked for its form."""
        if not DIGEST.fullmatch(digest):
            raise BadInput(f"{digest!r} is not a sha256 digest")
        return self.blobs / digest.removeprefix("sha256:")

    # -- writing ---------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        files: Mapping[str, Path],
        description: Description,
        *,
        lineage: str = "",
        annotations: Mapping[str, str] | None = None,
        move: bool = False,
        digests: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> Artifact:
        """Take files into the store as one model, under `name`.

        Args:
            files: path inside the model -> file on disk.
            lineage: digest of the source model's weights; by default that of these files' weights.
            move: the files are ours to move (they are renamed into place); otherwise they are copied.
            digests: promised digests by path; a difference is a DigestMismatch and nothing is added.
        """
        full = normal_name(name)
        with self._changing():
            layers = []
            for path, file in sorted(files.items()):
                path = safe_path(path)
                digest, size = self._take(file, path, move, (digests or {}).get(path), progress)
                layers.append(Layer(path, media_type(path), digest, size))
            weights = [x.digest for x in layers if x.path.endswith((".gguf", ".safetensors"))]
            lineage = lineage or (weights[0] if len(weights) == 1 else digest_of("\n".join(weights).encode()))
            config = self._put_bytes(canonical(description.to_json(x.digest for x in layers)))
            notes = {**(annotations or {}), LINEAGE: lineage}
            manifest = self._put_bytes(canonical(manifest_json(config, layers, notes)))
            self._set_ref(full, manifest)
        return self.get(full)

    def tag(self, name: str, new_name: str) -> Artifact:
        """Give a model a second name."""
        digest = self.get(name).digest
        full = normal_name(new_name)
        with self._changing():
            self._set_ref(full, (digest, self.blob(digest).stat().st_size))
        return self.get(full)

    def remove(self, name: str) -> int:
        """Remove a name, and every blob that no other name needs. Returns the bytes freed."""
        refs = self._refs()
        full = normal_name(name)
        if full not in refs:
            raise ModelNotFound(name, [short_name(n) for n in refs])
        with self._changing():
            self._set_ref(full, None)
            return self._collect()

    def verify(self, name: str | None = None) -> list[Problem]:
        """Read every file of one or all models again and compare digests. Empty means all is well."""
        problems = []
        for full in [normal_name(name)] if name else self.names():
            try:
                layers = self.get(full).layers
            except StoreError as error:
                problems.append(Problem(full, "manifest", error.message))
                continue
            for layer in layers:
                path = self.blob(layer.digest)
                if not path.exists():
                    problems.append(Problem(full, layer.path, "missing"))
                elif path.stat().st_size != layer.size:
                    problems.append(
                        Problem(full, layer.path, f"{path.stat().st_size} bytes, not {layer.size}")
                    )
                elif hash_file(path) != layer.digest:
                    problems.append(Problem(full, layer.path, "content differs from its digest"))
        return problems

    def materialize(self, artifact: Artifact, folder: Path) -> Path:
        """Lay an artifact's files out under `folder` with their own names, as hard links where the disk
        allows and copies elsewhere. The files are read-only: they are the store's own bytes."""
        for path, blob in artifact.files.items():
            target = folder / safe_path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(blob, target)
            except OSError:
                with _disk_full_is_ours(folder):
                    shutil.copyfile(blob, target)
        return folder

    # -- inside ----------------------------------------------------------------------------------

    def _refs(self) -> dict[str, str]:
        """Full name -> manifest digest."""
        refs = {}
        for entry in self._load_index()["manifests"]:
            ref = (entry.get("annotations") or {}).get(REF)
            if ref and DIGEST.fullmatch(str(entry.get("digest"))):
                try:
                    refs[normal_name(ref)] = entry["digest"]
                except BadInput:
                    log.warning("index.json names a model %r, which is not a model name", ref)
        return refs

    def _load_index(self) -> dict[str, Any]:
        try:
            index = json.loads(self._index.read_bytes())
        except FileNotFoundError:
            return {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
        except ValueError as error:
            raise self._damaged_index(error) from error
        if not isinstance(index, dict) or not isinstance(index.get("manifests"), list):
            raise self._damaged_index("it lists no manifests")
        return index

    def _damaged_index(self, why: object) -> StoreError:
        return StoreError(
            f"{self._index} is damaged: {why}", hint="Restore it from a backup, or move the folder away."
        )

    def _read(self, name: str, digest: str) -> Artifact:
        try:
            path = self.blob(digest)
            manifest = json.loads(path.read_bytes())
            config = json.loads(self.blob(manifest["config"]["digest"]).read_bytes())
            layers = parse_layers(manifest)
            return Artifact(
                short_name(name),
                digest,
                Description.from_json(config),
                layers,
                {x.path: self.blob(x.digest) for x in layers},
                manifest.get("annotations") or {},
                path.stat().st_mtime,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"model {name!r} in the store is damaged: {error}",
                hint=f"`alight rm {name}` and pull it again.",
            ) from error

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the store's lock, with the layout in place and the leavings of dead writers gone."""
        from filelock import FileLock  # readers need no lock

        with _disk_full_is_ours(self.root):
            self.blobs.mkdir(parents=True, exist_ok=True)
            self._tmp.mkdir(exist_ok=True)
            with FileLock(self.root / "lock"):
                for stale in self._tmp.iterdir():  # writers hold the lock, so whoever left these is dead
                    stale.unlink()
                layout = self.root / "oci-layout"
                if not layout.exists():
                    self._replace(layout, b'{"imageLayoutVersion":"1.0.0"}')
                yield

    def _take(
        self, file: Path, path: str, move: bool, promised: str | None, progress: Progress | None
    ) -> tuple[str, int]:
        """Put one file among the blobs; returns its digest and size."""
        total = file.stat().st_size
        if not move:
            free = shutil.disk_usage(self.root).free
            if total > free:
                raise DiskFull(self.root, total, free)
        temporary = self._tmp / secrets.token_hex(8)
        report = (lambda done: progress(path, done, total)) if progress else None
        try:
            if move:
                digest = hash_file(file, report=report)
            else:
                with file.open("rb") as source, temporary.open("wb") as out:
                    digest = _hash(source, out, report)
                    _sync(out)
            if promised and digest != promised:
                raise DigestMismatch(
                    f"{path} has digest {digest}, but {promised} was promised",
                    hint="Fetch it again; nothing was added.",
                )
            blob = self.blob(digest)
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
            _sync_folder(self.blobs)
            return digest, total
        finally:
            temporary.unlink(missing_ok=True)

    def _put_bytes(self, data: bytes) -> tuple[str, int]:
        digest = digest_of(data)
        self._replace(self.blob(digest), data)
        return digest, len(data)

    def _set_ref(self, full: str, manifest: tuple[str, int] | None) -> None:
        """Point a name at a manifest, or drop the name."""
        index = self._load_index()

        def is_it(entry: Any) -> bool:
            ref = (entry.get("annotations") or {}).get(REF)
            return isinstance(ref, str) and ref.casefold() in (full, full.removesuffix(":latest"))

        index["manifests"] = [x for x in index["manifests"] if not is_it(x)]
        if manifest:
            digest, size = manifest
            entry = {"mediaType": MANIFEST, "digest": digest, "size": size, "annotations": {REF: full}}
            index["manifests"].append(entry)
        self._replace(self._index, json.dumps(index, indent=2).encode())

    def _collect(self) -> int:
        """Delete blobs that no manifest in the index needs; returns the bytes freed."""
        needed: set[str] = set()
        for entry in self._load_index()["manifests"]:
            needed.add(str(entry["digest"]))
            try:
                manifest = json.loads(self.blob(entry["digest"]).read_bytes())
                needed.add(manifest["config"]["digest"])
                needed.update(layer["digest"] for layer in manifest["layers"])
            except (OSError, ValueError, KeyError, TypeError):
                # A manifest we cannot read may still need any blob: then nothing is deleted.
                log.warning("a manifest in %s is damaged; nothing was cleaned up", self.root)
                return 0
        freed = 0
        for blob in self.blobs.iterdir():
            if f"sha256:{blob.name}" not in needed:
                freed += blob.stat().st_size
                blob.unlink()
        return freed

    def _replace(self, path: Path, data: bytes) -> None:
        """Write a small file so that it is either old or new, whatever happens."""
        temporary = self._tmp / secrets.token_hex(8)
        with temporary.open("wb") as out:
            out.write(data)
            _sync(out)
        temporary.rename(path)
        _sync_folder(path.parent)


def short_name(full: str) -> str:
    """A full name as people write it: without ":latest"."""
    return full.removesuffix(":latest")


def hash_file(path: Path, *, report: Callable[[int], None] | None = None) -> str:
    """The sha256 digest of a file."""
    with path.open("rb") as source:
        return _hash(source, None, report)


def _hash(source: BinaryIO, copy_to: BinaryIO | None, report: Callable[[int], None] | None) -> str:
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
def _disk_full_is_ours(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path) from error
        raise


__all__ = ["Problem", "Store", "hash_file", "normal_name", "short_name"]
