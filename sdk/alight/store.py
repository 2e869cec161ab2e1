"""The model store: an OCI image layout on disk that standard tools can read.

    $ALIGHT_HOME/models/
        oci-layout  index.json  blobs/sha256/<hex>     (the OCI image layout)
        uploads/<hex>  folders/<hex>/  tmp/  lock      (ours)

Nothing half-written is ever visible: a blob is written to tmp/, synced, then renamed; index.json is
replaced the same way, and it names a model only after all its blobs are in place. One file lock guards
changes; readers need none.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alight import folders, paths
from alight.artifact import (
    INDEX,
    LINEAGE,
    MANIFEST,
    WEIGHT,
    Artifact,
    Description,
    Layer,
    canonical,
    digest_of,
    is_projector,
    manifest_json,
    media_type,
    parse_layers,
    safe_path,
)
from alight.blobs import DIGEST, Blobs, Upload, disk_full_is_ours, hash_file
from alight.errors import BadInput, ModelNotFound, StoreError

log = logging.getLogger(__name__)

REF = "org.opencontainers.image.ref.name"
_NAME = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*(?::[\w][\w.-]{0,127})?")

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
        self._blobs = Blobs(self.root)
        self.blobs = self._blobs.folder
        self._index = self.root / "index.json"

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
        return self._blobs.path(digest)

    def find_blob(self, digest: str) -> Path | None:
        """Where a blob is, of a model or uploaded; None where there is none."""
        return self._blobs.find(digest)

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
                total = file.stat().st_size
                report = partial(_report, progress, path, total) if progress else None
                promised = (digests or {}).get(path)
                digest, size = self._blobs.take(file, move=move, promised=promised, report=report)
                layers.append(Layer(path, media_type(path), digest, size))
            self._complete(full, layers, description, lineage, annotations or {})
        return self.get(full)

    def upload(self, digest: str, size: int = 0) -> Upload:
        """A place to write a blob to that `compose` will need. It waits a day for that, outside the layout.

        Args:
            size: its bytes, where they are known.

        Raises:
            BadInput: the digest has another form. DiskFull: it will not fit.
        """
        with disk_full_is_ours(self.root):
            return self._blobs.upload(digest, size)

    def compose(
        self,
        name: str,
        layers: Iterable[Layer],
        description: Description,
        *,
        small: Mapping[str, bytes] | None = None,
        files: Mapping[str, Path] | None = None,
        lineage: str = "",
        annotations: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Make a model of blobs that are here already, of other models or uploaded, and of new files.

        Args:
            small: path inside the model -> what is in the file.
            files: path inside the model -> a file on disk, which is moved into the store.

        Raises:
            StoreError: a blob is not here (any more).
        """
        full = normal_name(name)
        with self._changing():
            new = [(path, self._blobs.put(data)) for path, data in (small or {}).items()]
            for path, file in (files or {}).items():
                new.append((path, self._blobs.take(file, move=True, promised=None, report=None)))
            whole = [Layer(safe_path(path), media_type(path), *blob) for path, blob in new]
            taken = {layer.path for layer in whole}
            whole += [layer for layer in layers if layer.path not in taken]
            for layer in whole:
                self._blobs.adopt(layer.digest)
            whole.sort(key=lambda layer: layer.path)
            self._complete(full, whole, description, lineage, annotations or {})
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

        with disk_full_is_ours(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / "lock"):
                self._blobs.prepare()
                layout = self.root / "oci-layout"
                if not layout.exists():
                    self._blobs.replace(layout, b'{"imageLayoutVersion":"1.0.0"}')
                yield

    def _complete(
        self,
        full: str,
        layers: list[Layer],
        description: Description,
        lineage: str,
        annotations: Mapping[str, str],
    ) -> None:
        """Write config and manifest of a model whose layers are in place, and name it."""
        weights = [x.digest for x in layers if x.media_type == WEIGHT and not is_projector(x.path)]
        lineage = lineage or (weights[0] if len(weights) == 1 else digest_of("\n".join(weights).encode()))
        config = self._blobs.put(canonical(description.to_json(x.digest for x in layers)))
        manifest = manifest_json(config, layers, {**annotations, LINEAGE: lineage})
        self._set_ref(full, self._blobs.put(canonical(manifest)))

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
        self._blobs.replace(self._index, json.dumps(index, indent=2).encode())

    def _collect(self) -> int:
        """Delete blobs that no manifest in the index needs; returns the bytes freed."""
        named = {str(entry["digest"]) for entry in self._load_index()["manifests"]}
        needed = set(named)
        for digest in named:
            try:
                manifest = json.loads(self.blob(digest).read_bytes())
                needed.add(manifest["config"]["digest"])
                needed.update(layer["digest"] for layer in manifest["layers"])
            except (OSError, ValueError, KeyError, TypeError):
                # A manifest we cannot read may still need any blob: then nothing is deleted.
                log.warning("a manifest in %s is damaged; nothing was cleaned up", self.root)
                return 0
        folders.sweep(self.root, named)
        freed = 0
        for blob in self.blobs.iterdir():
            if f"sha256:{blob.name}" not in needed:
                freed += blob.stat().st_size
                blob.unlink()
        return freed


def short_name(full: str) -> str:
    """A full name as people write it: without ":latest"."""
    return full.removesuffix(":latest")


def _report(progress: Progress, path: str, total: int, done: int) -> None:
    progress(path, done, total)


__all__ = ["DIGEST", "Problem", "Store", "Upload", "hash_file", "normal_name", "short_name"]
