"""alight list"""

from __future__ import annotations

from rich.text import Text

from alight.cli.describe import artifact_json
from alight.cli.output import AsJson, console, err, human_bytes, human_count, human_time, print_json, table
from alight.store import Store


def command(json: AsJson = False) -> None:
    """List the models in the store.

    Example: alight list
    """
    models = Store().artifacts()
    if json:
        print_json([artifact_json(m) for m in models])
        return
    if not models:
        err.print("No models yet. `alight pull builtin:smollm2` fetches a small one.")
        return
    rows = table("NAME", "SIZE", "FORMAT", "QUANT", "PARAMS", "MODIFIED", right=("SIZE", "PARAMS"))
    for m in models:
        about = m.description
        size, count = human_bytes(m.size), human_count(about.parameters)
        cells = (m.name, size, about.format, about.quantization, count, human_time(m.modified))
        rows.add_row(*map(Text, cells))
    console.print(rows)
