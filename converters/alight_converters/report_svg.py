"""Plots as inline SVG: scatter, line and bars. Colours come from the page's CSS, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 44
_LABEL = 14  # height of a line of labels


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a scatter plot. `kind` is "front", "chosen" or "" and becomes its CSS class."""

    x: float
    y: float
    label: str
    kind: str = ""


def scatter(dots: Sequence[Dot], x_title: str, y_title: str, *, log_y: bool = False) -> str:
    """Points with labels; those of the front are joined by a line."""
    dots = [d for d in dots if math.isfinite(d.x) and math.isfinite(d.y) and (d.y > 0 or not log_y)]
    if not dots:
        return ""
    axes = _Axes.around([d.x for d in dots], [d.y for d in dots], log_y=log_y)
    front = sorted((d for d in dots if d.kind), key=lambda d: d.x)
    parts = [axes.draw(x_title, y_title)]
    if len(front) > 1:
        parts.append(f'<polyline class="front" points="{axes.path((d.x, d.y) for d in front)}"/>')
    taken: list[tuple[float, float]] = []
    for dot in dots:
        x, y = axes.place(dot.x, dot.y)
        parts.append(f'<circle class="dot {escape(dot.kind)}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        parts.append(_label(dot.label, x, y, taken))
    return _svg(parts, f"{y_title} against {x_title}")


def line(values: Sequence[float], x_title: str, y_title: str) -> str:
    """A curve over 1, 2, 3, …, with gaps where a value is not finite."""
    points = [(float(i + 1), v) for i, v in enumerate(values) if math.isfinite(v)]
    if len(points) < 2:
        return ""
    axes = _Axes.around([x for x, _ in points], [y for _, y in points])
    curve = f'<polyline class="curve" points="{axes.path(points)}"/>'
    return _svg([axes.draw(x_title, y_title), curve], f"{y_title} over {x_title}")


def bars(names: Sequence[str], values: Sequence[float], x_title: str, y_title: str) -> str:
    """One bar for each value; each tells its name and value when it is pointed at."""
    pairs = [(n, v) for n, v in zip(names, values, strict=True) if math.isfinite(v)]
    if not pairs:
        return ""
    axes = _Axes.around([0.5, len(pairs) + 0.5], [0.0, *(v for _, v in pairs)], margin=False)
    width = max(1.0, 0.8 * (WIDTH - _LEFT - _RIGHT) / len(pairs))
    parts = [axes.draw(x_title, y_title)]
    for i, (name, value) in enumerate(pairs):
        x, top = axes.place(i + 1, max(value, 0.0))
        _, bottom = axes.place(i + 1, min(value, 0.0))
        parts.append(
            f'<rect class="bar" x="{x - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{max(bottom - top, 0.5):.1f}"><title>{escape(name)}: {value:.4g}</title></rect>'
        )
    return _svg(parts, f"{y_title} by {x_title}")


@dataclass(frozen=True, slots=True)
class _Axes:
    """From data to pixels."""

    x0: float
    x1: float
    y0: float
    y1: float
    log_y: bool

    @classmethod
    def around(
        cls, xs: Sequence[float], ys: Sequence[float], *, log_y: bool = False, margin: bool = True
    ) -> _Axes:
        heights = [math.log10(y) for y in ys] if log_y else list(ys)
        x0, x1 = _widened(min(xs), max(xs), 0.08 if margin else 0.0)
        y0, y1 = _widened(min(heights), max(heights), 0.08)
        return cls(x0, x1, y0 if margin or (y0 < 0 and min(heights) < 0) else 0.0, y1, log_y)

    def place(self, x: float, y: float) -> tuple[float, float]:
        height = math.log10(y) if self.log_y else y
        across = (x - self.x0) / (self.x1 - self.x0)
        up = (height - self.y0) / (self.y1 - self.y0)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    def path(self, points: Iterator[tuple[float, float]] | Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*p) for p in points))

    def draw(self, x_title: str, y_title: str) -> str:
        parts = []
        bottom, left = HEIGHT - _BOTTOM, _LEFT
        for tick in _ticks(self.x0, self.x1):
            x, _ = self.place(tick, 10**self.y0 if self.log_y else self.y0)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'
            )
        for height in _ticks(self.y0, self.y1):
            value = 10**height if self.log_y else height
            _, y = self.place(self.x0, value)
            parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
            )
        middle = (HEIGHT - _BOTTOM + _TOP) / 2
        parts.append(
            f'<text class="title" x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{escape(x_title)}</text>"
        )
        parts.append(
            f'<text class="title" x="14" y="{middle:.0f}" text-anchor="middle" '
            f'transform="rotate(-90 14 {middle:.0f})">{escape(y_title)}</text>'
        )
        return "".join(parts)


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    span = (high - low) or abs(high) or 1.0
    return low - share * span, high + share * span


def _ticks(low: float, high: float) -> Iterator[float]:
    """About five round numbers."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    tick = math.ceil(low / step) * step
    while tick <= high + 1e-9 * step:
        yield round(tick, 12)
        tick += step


def _label(text: str, x: float, y: float, taken: list[tuple[float, float]]) -> str:
    """Beside its dot, moved down where another label is."""
    right = x < WIDTH - 130
    at = y + 4
    while any(abs(at - other) < _LABEL and abs(x - near) < 110 for near, other in taken):
        at += _LABEL
    taken.append((x, at))
    anchor = "start" if right else "end"
    return (
        f'<text class="label" x="{x + (9 if right else -9):.1f}" y="{at:.1f}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
