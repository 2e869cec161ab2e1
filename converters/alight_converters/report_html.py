"""The report as one HTML page: no scripts, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from alight_converters.report_svg import Dot, bars, line, scatter

Json = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; --fg: #1d2129; --bg: #ffffff; --dim: #667085; --line: #e4e7ec;
  --accent: #1570ef; --good: #079455; --card: #f9fafb; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e8ec; --bg: #14171c; --dim: #98a2b3; --line: #2b313b;
  --accent: #6cabff; --good: #47cd89; --card: #1b1f26; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 1180px;
  margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 10px; }
h3 { font-size: 16px; margin: 20px 0 6px; } p.lead { font-size: 17px; margin: 4px 0 20px; }
.dim, figcaption { color: var(--dim); } .plots { display: grid; gap: 20px;
  grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px; }
figcaption { font-size: 13px; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--fg); font: 12px system-ui, sans-serif; } svg .tick { fill: var(--dim); font-size: 11px; }
svg .title { fill: var(--dim); } svg .grid { stroke: var(--line); } svg .dot { fill: var(--dim); }
svg .front { stroke: var(--accent); fill: none; } svg .dot.front { fill: var(--accent); }
svg .dot.chosen { fill: var(--good); stroke: var(--fg); } svg .curve { stroke: var(--accent); fill: none;
  stroke-width: 1.5; } svg .bar { fill: var(--accent); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; } tr.chosen td { color: var(--good); font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 10px; margin: 4px 0; font: 13px/1.45 ui-monospace, monospace; }
.pair { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
"""


def page(report: Json) -> str:
    """The whole page. Every text that comes from a model, a file or a user is escaped."""
    source, device = report["source"]["name"], report["device"]["name"]
    title = f"{source} for {device}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">Chosen: <b>{escape(str(report["chosen"]))}</b>, {escape(str(report["reason"]))}.</p>',
        _facts(report),
        _candidates(report),
        _fallbacks(report),
        _stages(report["stages"]),
        _samples(report["samples"]),
        _settings(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _facts(report: Json) -> str:
    device, on = report["device"], report["measured_on"]
    here = device["id"] == "this"
    return _table(
        ("", ""),
        [
            ("quality measured on", f"{report['quality_measured_on']}; {_tokens(report)} predictions"),
            (
                "speed measured on",
                f"{on['processor']}, {on['cores']} cores, {on['system']}{_each(report) if here else ', one stream'}",
            ),
            (
                "speed that counts",
                "as measured" if here else f"as predicted for {device['name']}{_each(report)}",
            ),
            ("built", f"{report['created']} by alight {report['alight']}"),
        ],
    )


def _each(report: Json) -> str:
    streams = report["limits"].get("streams", 1)
    return f", of each of {streams} streams" if streams > 1 else ""


def _tokens(report: Json) -> str:
    return f"{max((c['quality']['tokens'] for c in report['candidates']), default=0):,}"


def _candidates(report: Json) -> str:
    here = report["device"]["id"] == "this"
    found = report["candidates"]
    size: Callable[[Json], float] = lambda c: c["size"] / 1e6  # noqa: E731
    speed: Callable[[Json], float] = lambda c: _speed(c, here)  # noqa: E731
    what = (
        f"measured here{_each(report)}"
        if here
        else f"predicted for {report['device']['name']}{_each(report)}"
    )
    decode = f"decode, tokens/s ({what})"
    plots = [
        ("Loss", scatter(_dots(report, size, _kl), "size, MB", "KL to the source, nats", log_y=True)),
        ("Perplexity", scatter(_dots(report, size, _perplexity), "size, MB", "perplexity")),
        ("Speed", scatter(_dots(report, size, speed), "size, MB", decode)),
    ]
    there = "" if here else f" for {report['device']['name']}"
    measured = "decode measured" if here else "decode measured on the building machine, one stream"
    header = (
        "form", "size, MB", "KL mean", "KL p99", "top-1", "perplexity",
        measured + (_each(report) if here else ""), f"decode predicted{there}{_each(report)}",
        "prefill measured, one stream", "memory measured, MB", f"memory predicted{there}, MB",
    )  # fmt: skip
    rows, kinds = [], []
    for c in found:
        q, p = c["quality"], c["prediction"]
        star = " *" if c["pareto"] else ""
        rows.append(
            (
                f"{c['format']} {c['quantization']}" + (" (source)" if c["is_source"] else "") + star,
                f"{size(c):,.1f}", _number(q["kl_mean"]), _number(q["kl_p99"]),
                f"{q['top1']:.1%}" if q["top1"] is not None else "", f"{q['perplexity']:.3f}",
                f"{_speed(c, True):.1f}", f"{p['decode']:.1f}", f"{c['speed']['prefill']:.0f}",
                f"{c['memory_bytes'] / 1e6:,.0f}" if c["memory_bytes"] else "",
                f"{sum(p['memory'].values()) / 1e6:,.0f}",
            )
        )  # fmt: skip
        kinds.append("chosen" if c["quantization"] == report["chosen"] else "")
    return (
        "<h2>Candidates</h2>"
        + _figures(plots, "The line is the Pareto front; green is the chosen one.")
        + _table(header, rows, kinds)
        + '<p class="dim">* no other is smaller, closer to the source and faster at once. '
        "KL in nats, speeds in tokens/s.</p>"
    )


def _dots(report: Json, x: Callable[[Json], float], y: Callable[[Json], float]) -> list[Dot]:
    def kind(c: Json) -> str:
        return "chosen" if c["quantization"] == report["chosen"] else "front" if c["pareto"] else ""

    return [Dot(x(c), y(c), c["quantization"], kind(c)) for c in report["candidates"]]


def _kl(c: Json) -> float:
    return float("nan") if c["quality"]["kl_mean"] is None else float(c["quality"]["kl_mean"])


def _perplexity(c: Json) -> float:
    return float(c["quality"]["perplexity"])


def _speed(c: Json, measured: bool) -> float:
    if not measured:
        return float(c["prediction"]["decode"])
    return float(c["speed"]["decode"] if c["stream_speed"] is None else c["stream_speed"])


# -- stages ------------------------------------------------------------------------------------------


def _stages(stages: Sequence[Json]) -> str:
    if not stages:
        return ""
    parts = ["<h2>Stages</h2>"]
    for number, stage in enumerate(stages, 1):
        took = f"{stage['seconds']:.0f} s" + (", in an earlier build" if stage["cached"] else "")
        parts.append(f"<h3>{number}. {escape(stage['kind'])}</h3>")
        parts.append(
            f'<p class="dim">{took}; {stage["parameters"] / 1e6:,.1f} M parameters, '
            f"{stage['bytes'] / 1e6:,.1f} MB</p>"
        )
        parts.append(_measured(stage["measured"]))
    return "".join(parts)


def _measured(measured: Mapping[str, Any]) -> str:
    """What a pass measured: curves and bars where it gives many numbers, a table for the rest."""
    plots, facts, tables = [], [], []
    for key, value in measured.items():
        name = key.replace("_", " ")
        if _is_numbers(value) and len(value) > 1:
            if "loss" in key:
                plots.append((name, line(value, "step", name)))
            else:
                plots.append((name, bars([str(i) for i in range(len(value))], value, "layer", name)))
        elif isinstance(value, dict) and len(value) > 1 and _is_numbers(list(value.values())):
            plots.append((name, bars(list(value), list(value.values()), "tensor", name)))
        elif kinds := _common_keys(value):
            plots += [
                (f"{name}: {k}", bars(list(value), [v[k] for v in value.values()], "tensor", f"KL at {k}"))
                for k in kinds
            ]
        elif isinstance(value, list) and value and all(isinstance(x, dict) for x in value):
            header = tuple(value[0])
            tables.append(f"<h3>{escape(name)}</h3>")
            tables.append(_table(header, [tuple(_text(x.get(h)) for h in header) for x in value]))
        else:
            facts.append((name, _text(value)))
    return _figures(plots, "") + _table(("", ""), facts) + "".join(tables)


def _common_keys(value: Any) -> list[str]:
    """Of a mapping of mappings to numbers, such as the loss of each tensor at each type: the keys that all have."""
    if (
        not isinstance(value, dict)
        or len(value) < 2
        or not all(isinstance(v, dict) and v for v in value.values())
    ):
        return []
    if not all(_is_numbers(list(v.values())) for v in value.values()):
        return []
    first, *rest = value.values()
    return [key for key in first if all(key in v for v in rest)]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) for x in value
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _fallbacks(report: Json) -> str:
    """Tensors of another type than was asked for: how many by type, and a folded list."""
    found = report.get("fallbacks", [])
    if not found:
        return ""
    counts = Counter((f["wanted"], f["taken"]) for f in found)
    told = ", ".join(f"{count} are {taken}, not {wanted}" for (wanted, taken), count in counts.items())
    rows = [(f["tensor"], f["wanted"], f["taken"]) for f in found]
    return (
        f"<h2>Types that did not fit</h2><p>Of the tensors {escape(told)}: their rows are no multiple of that type's "
        "block, so llama.cpp takes one that is stored in smaller blocks and is usually larger.</p>"
        f"<details><summary>All {len(found)}</summary>{_table(('tensor', 'asked for', 'stored as'), rows)}</details>"
    )


# -- the rest ----------------------------------------------------------------------------------------


def _samples(samples: Sequence[Json]) -> str:
    if not samples:
        return ""
    parts = [
        "<h2>Answers</h2>",
        '<p class="dim">Greedy; the source on the left, the artifact on the right.</p>',
    ]
    for sample in samples:
        parts.append(f"<h3>{escape(sample['prompt'])}</h3>")
        sides = "".join(f"<pre>{escape(sample[side])}</pre>" for side in ("source", "artifact"))
        parts.append(f'<div class="pair">{sides}</div>')
    return "".join(parts)


def _settings(report: Json) -> str:
    shown = {key: report[key] for key in ("source", "settings", "limits", "versions", "device")}
    return f"<h2>To repeat it</h2><pre>{escape(json.dumps(shown, indent=2, ensure_ascii=False))}</pre>"


def _figures(plots: Sequence[tuple[str, str]], caption: str) -> str:
    drawn = [
        f"<figure><b>{escape(name)}</b>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for name, svg in plots
        if svg
    ]
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    if not rows:
        return ""
    align = ["", *(' class="n"' for _ in header[1:])] if any(header) else [""] * len(header)
    head = "".join(f"<th{a}>{escape(h)}</th>" for a, h in zip(align, header, strict=True))
    body = []
    for i, row in enumerate(rows):
        kind = f' class="{escape(kinds[i])}"' if kinds and kinds[i] else ""
        cells = "".join(f"<td{a}>{escape(cell)}</td>" for a, cell in zip(align, row, strict=True))
        body.append(f"<tr{kind}>{cells}</tr>")
    shown = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="wide"><table>{shown}<tbody>{"".join(body)}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
