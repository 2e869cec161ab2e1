"""alight: land any language model on any device.

    import alight

    model = alight.load("builtin:smollm2")
    print(model.chat([{"role": "user", "content": "Why is the sky blue?"}]))

Importing alight loads no engine and no web framework; each is loaded when it is first needed.
"""

from alight.api import build, connect, discover, load, pull
from alight.artifact import Artifact
from alight.devices import Device, probe
from alight.errors import AlightError
from alight.store import Store
from alight.target import Chunk, Completion, LoadOptions, Model, Sampling, Target

__version__ = "0.1.0"

__all__ = [
    "AlightError",
    "Artifact",
    "Chunk",
    "Completion",
    "Device",
    "LoadOptions",
    "Model",
    "Sampling",
    "Store",
    "Target",
    "build",
    "connect",
    "discover",
    "load",
    "probe",
    "pull",
]
