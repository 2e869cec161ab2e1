"""What a model's artifact brings along for requests that say nothing else: a preset, and LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass

from alight.preset import Preset, adapters_of
from alight.server.manager import Models
from alight.server.ollama_requests import Options
from alight.server.ollama_view import with_template
from alight.target import Model, Sampling


@dataclass(frozen=True, slots=True)
class Brought:
    """The settings of a model, as they were made with Ollama's `create`.

    Attributes:
        sampling: what takes the place of alight's own defaults.
    """

    preset: Preset
    sampling: Sampling

    @classmethod
    def of(cls, models: Models, name: str) -> Brought:
        artifact = models.find(name).artifact
        preset = Preset.of(artifact)
        adapters = tuple((name, 1.0) for name, _ in adapters_of(artifact)) if artifact else ()
        return cls(preset, Options().over(preset.parameters).sampling(adapters=adapters))

    def view(self, model: Model) -> Model:
        """The model with the chat template that was set for it."""
        return with_template(model, self.preset.template)
