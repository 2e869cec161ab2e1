"""A model artifact: an OCI manifest in the CNCF ModelPack format, and its files.

Specification: https://github.com/modelpack/model-spec. An artifact is immutable and addressed by the
digest of its manifest. Its *lineage* is the digest of the source model's weights: artifacts of one
lineage are the same model in another form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from alight.errors import InvalidModelFile
from alight.exported import format_of, read_exported
from alight.gguf import GGUFHeader, parts_of, read_header, read_headers, stem_of

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
CODE = "application/vnd.cncf.model.code.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"

FILEPATH = "org.cncf.model.filepath"
LINEAGE = "alight.lineage"
SOURCE = "alight.source"  # where it came from, with the revision that was found
ASKED = "alight.asked"  # the source as the user wrote it

REPORT = "report.json"  # the quality report's path inside an artifact
REPORT_PAGE = "report.html"  # the same for people


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of an artifact: its path inside the model, media type, digest and size."""

    path: str
    media_type: str
    digest: str
    size: int

    def to_json(self) -> dict[str, Any]:
        return {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size,
            "annotations": {FILEPATH: self.path},
        }


@dataclass(frozen=True, slots=True)
class Description:
    """What a model says about itself: the ModelPack config."""

    format: str
    architecture: str = "unknown"
    parameters: int = 0
    quantization: str = ""
    licence: str = ""
    family: str = ""
    title: str = ""

    def to_json(self, diff_ids: Iterable[str]) -> dict[str, Any]:
        descriptor = {
            "name": self.title,
            "family": self.family,
            "licenses": [self.licence] if self.licence else [],
        }
        config = {
            "architecture": self.architecture,
            "format": self.format,
            "paramSize": str(self.parameters),
            "quantization": self.quantization,
        }
        return {
            "descriptor": {k: v for k, v in descriptor.items() if v},
            "modelfs": {"type": "layers", "diffIds": list(diff_ids)},
            "config": {k: v for k, v in config.items() if v},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Description:
        descriptor, config = data.get("descriptor") or {}, data.get("config") or {}
        size = str(config.get("paramSize") or "0")
        return cls(
            format=str(config.get("format", "")),
            architecture=str(config.get("architecture", "unknown")),
            parameters=int(size) if size.isdigit() else 0,
            quantization=str(config.get("quantization", "")),
            licence=", ".join(descriptor.get("licenses") or []),
            family=str(descriptor.get("family", "")),
            title=str(descriptor.get("name", "")),
        )

    @classmethod
    def of_gguf(cls, header: GGUFHeader, *, licence: str = "", title: str = "") -> Description:
        meta = header.metadata
        return cls(
            format="gguf",
            architecture=header.architecture,
            parameters=header.parameters,
            quantization=header.quantization,
            licence=licence or str(meta.get("general.license", "")),
            family=str(meta.get("general.basename", header.architecture)),
            title=title or str(meta.get("general.name", "")),
        )

    @classmethod
    def of_folder(cls, files: Mapping[str, Path], *, licence: str = "", title: str = "") -> Description:
        """Of the files of an ONNX or MLC folder, by their paths inside it.

        Raises:
            InvalidModelFile: they are of another kind, or damaged.
        """
        about = read_exported(files)
        return cls(
            format=about.format,
            architecture=about.architecture,
            parameters=about.parameters,
            quantization=about.quantization,
            licence=licence or about.licence,
            family=about.architecture,
            title=title,
        )


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model that is ready to load: its description, and where each file is on disk.

    `digest` is that of the manifest ("sha256:…"); it is empty for a loose file that is in no store.
    """

    name: str
    digest: str
    description: Description
    layers: tuple[Layer, ...]
    files: Mapping[str, Path]  # path inside the model -> file on disk
    annotations: Mapping[str, str] = field(default_factory=dict)
    modified: float = 0.0  # seconds since the epoch

    @property
    def format(self) -> str:
        return self.description.format

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(layer.size for layer in self.layers)

    @property
    def lineage(self) -> str:
        return self.annotations.get(LINEAGE, "")

    @property
    def weights(self) -> list[Path]:
        """The weight files of the language model, in the order of their names."""
        paths = sorted(layer.path for layer in self._weight_layers())
        return [self.files[path] for path in [p for p in paths if not is_projector(p)] or paths]

    @property
    def projector(self) -> Path | None:
        """The GGUF that lets the model see, if it brings one."""
        return next((self.files[path] for path in sorted(self.files) if is_projector(path)), None)

    @property
    def report(self) -> dict[str, Any] | None:
        """The quality report that `alight build` wrote, if there is one."""
        path = self.files.get(REPORT)
        return json.loads(path.read_text()) if path else None

    def header(self) -> GGUFHeader:
        """The GGUF header of the (first) weight file."""
        if self.format != "gguf":
            raise InvalidModelFile(
                f"{self.name} is in {self.format} format, not GGUF",
                hint="`alight build` makes a GGUF; converting checkpoints is not in this version yet.",
            )
        return read_header(self.weights[0])

    @property
    def trained_context(self) -> int:
        """Tokens; 0 where no file tells."""
        if self.format == "gguf":
            told = self.header().get("context_length")
            return told if isinstance(told, int) else 0
        return read_exported(self.files).trained_context if format_of(self.files) else 0

    def _weight_layers(self) -> list[Layer]:
        return [x for x in self.layers if x.media_type.startswith("application/vnd.cncf.model.weight.v1")]

    @classmethod
    def loose(cls, path: Path) -> Artifact:
        """A GGUF file (of a split one, any part), or an ONNX or MLC folder, as it lies, without a store.

        Raises:
            InvalidModelFile: it is of another kind, damaged, or a part of it is missing.
        """
        if path.is_dir():
            return cls._loose_folder(path)
        name, files = stem_of(path), {part.name: part for part in parts_of(path)}
        about = Description.of_gguf(read_headers(list(files.values())), title=name)
        stats = {inside: part.stat() for inside, part in files.items()}
        layers = tuple(Layer(inside, WEIGHT, "", stat.st_size) for inside, stat in stats.items())
        return cls(name.lower(), "", about, layers, files, modified=max(s.st_mtime for s in stats.values()))

    @classmethod
    def _loose_folder(cls, folder: Path) -> Artifact:
        files = files_below(folder)
        name = folder.resolve().name.lower()
        stats = {path: file.stat() for path, file in files.items()}
        layers = tuple(Layer(path, media_type(path), "", stat.st_size) for path, stat in stats.items())
        about = Description.of_folder(files, title=name)
        return cls(name, "", about, layers, files, modified=max(stat.st_mtime for stat in stats.values()))


def is_exported(folder: Path) -> bool:
    """Whether it is an ONNX or MLC folder, which `Artifact.loose` takes."""
    return folder.is_dir() and format_of(f.name for f in folder.iterdir()) is not None


def files_below(folder: Path) -> dict[str, Path]:
    """All files of a folder by their paths inside it, but for hidden ones."""
    found = (f for f in sorted(folder.rglob("*")) if f.is_file())
    files = {f.relative_to(folder).as_posix(): f for f in found}
    return {path: f for path, f in files.items() if not any(p.startswith(".") for p in Path(path).parts)}


def media_type(path: str) -> str:
    """The ModelPack media type for a file, by its name."""
    name = PurePosixPath(path).name.lower()
    if name.endswith((".gguf", ".safetensors", ".bin", ".onnx", ".onnx.data", ".onnx_data")):
        return WEIGHT
    if name.endswith((".so", ".dylib", ".dll", ".wasm", ".tar")):  # compiled for a device
        return CODE
    if (
        name in (REPORT, REPORT_PAGE)
        or name.startswith(("readme", "license", "licence"))
        or name.endswith(".md")
    ):
        return DOC
    return WEIGHT_CONFIG


def is_projector(path: str) -> bool:
    """Whether a file of a model is a vision projector, by its name: mmproj-model-f16.gguf."""
    name = PurePosixPath(path).name.lower()
    return "mmproj" in name and name.endswith(".gguf")


def safe_path(path: str) -> str:
    """A path inside a model, checked: it comes from outside and must not leave the model's folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path:
        raise InvalidModelFile(
            f"a file of the model is named {path!r}", hint="The artifact is not safe to unpack."
        )
    return str(PurePosixPath(*parts))


def canonical(data: Any) -> bytes:
    """JSON in one fixed form, so that the same content has the same digest everywhere."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def manifest_json(
    config: tuple[str, int], layers: Iterable[Layer], annotations: Mapping[str, str]
) -> dict[str, Any]:
    """The manifest of an artifact; `config` is the digest and size of the config blob."""
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": ARTIFACT,
        "config": {"mediaType": CONFIG, "digest": config[0], "size": config[1]},
        "layers": [layer.to_json() for layer in layers],
        "annotations": dict(sorted(annotations.items())),
    }


def parse_layers(manifest: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The layers of a manifest from outside, checked."""
    layers = []
    for item in manifest.get("layers") or []:
        path = (item.get("annotations") or {}).get(FILEPATH)
        if not path:
            raise InvalidModelFile(
                "a layer of the manifest has no file path", hint="It is not a ModelPack artifact."
            )
        layers.append(Layer(safe_path(path), str(item["mediaType"]), str(item["digest"]), int(item["size"])))
    return tuple(layers)
