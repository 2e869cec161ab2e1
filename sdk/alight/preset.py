"""What is set for a model in its artifact: a system text, a template, sampling parameters, first messages.

Ollama's Modelfile has these; here they are one small JSON file among the model's, `preset.json`. The weights
stay the same blob, so "mario", made from "smollm2" and a system text, takes no more room on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alight.artifact import Artifact, canonical
from alight.errors import InvalidModelFile

PRESET = "preset.json"  # the path inside an artifact
ADAPTER_SUFFIX = ".lora"  # of LoRA adapters (GGUF) inside an artifact; ".gguf" are its weights


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings that a model brings along.

    Attributes:
        system: comes first where a conversation brings no system message of its own.
        template: takes the place of the model's own chat template; Jinja.
        written: the template as its author wrote it, in Ollama's language; empty where that is Jinja, too.
        parameters: by the names of Ollama's options, such as temperature and num_ctx.
        messages: come before those of a conversation.
        parent: the model it was made from.
    """

    system: str = ""
    template: str = ""
    written: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] = ()
    parent: str = ""

    @classmethod
    def of(cls, artifact: Artifact | None) -> Preset:
        """The preset of an artifact; an empty one where it has none.

        Raises:
            InvalidModelFile: it cannot be read.
        """
        file = artifact.files.get(PRESET) if artifact else None
        if artifact is None or file is None:
            return cls()
        try:
            data = json.loads(file.read_bytes())
            texts = {key: data.get(key, "") for key in ("system", "template", "written", "parent")}
            parameters, messages = data.get("parameters", {}), data.get("messages", [])
            if not (
                all(isinstance(text, str) for text in texts.values())
                and isinstance(parameters, dict)
                and isinstance(messages, list)
                and all(isinstance(message, dict) for message in messages)
            ):
                raise ValueError("its fields have other types")
        except (OSError, ValueError, AttributeError) as error:
            raise InvalidModelFile(
                f"{PRESET} of {artifact.name!r} cannot be read: {error}", hint="Make or pull the model again."
            ) from error
        return cls(**texts, parameters=parameters, messages=tuple(messages))

    def to_bytes(self) -> bytes:
        """The file; what is empty is left out."""
        fields = {
            "system": self.system,
            "template": self.template,
            "written": self.written,
            "parameters": dict(self.parameters),
            "messages": [dict(message) for message in self.messages],
            "parent": self.parent,
        }
        return canonical({key: value for key, value in fields.items() if value})

    def apply_to(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """A conversation with this preset's messages before it, after its system text or the conversation's own.

        (Many templates take a system message in the first place only.)
        """
        own = [*messages[:1]] if messages and messages[0].get("role") in ("system", "developer") else []
        ours: list[Mapping[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        return [*(own or ours), *self.messages, *messages[len(own) :]]


def adapters_of(artifact: Artifact) -> tuple[tuple[str, str], ...]:
    """The LoRA adapters that an artifact brings, as LoadOptions takes them: name and file."""
    found = [path for path in artifact.files if path.endswith(ADAPTER_SUFFIX)]
    return tuple((path.removesuffix(ADAPTER_SUFFIX), str(artifact.files[path])) for path in sorted(found))
