"""What the server measures of itself, for Prometheus.

Counters and histograms are kept here as answers come; what can be asked for (memory, queues, the engines'
own figures) is asked when somebody scrapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from alight import __version__
from alight.devices import machine, throttling
from alight.errors import AlightError
from alight.server.manager import Models
from alight.server.offers import Loaded
from alight.target import Chunk

# Seconds. A Raspberry Pi and a GPU must both find their place.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2.5)


class Metrics:
    """The figures of one server."""

    def __init__(self, models: Models) -> None:
        self._registry = registry = CollectorRegistry()
        model = ("model",)
        self._requests = Counter(
            "alight_requests", "HTTP requests.", ("method", "route", "status"), registry=registry
        )
        self._first = Histogram(
            "alight_time_to_first_token_seconds",
            "From the request to the first token, waiting and loading included.",
            model,
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self._between = Histogram(
            "alight_inter_token_seconds",
            "Between two tokens of an answer.",
            model,
            buckets=_BETWEEN_TOKENS,
            registry=registry,
        )
        self._answers = Counter("alight_answers", "Answers that came to their end.", model, registry=registry)
        self._tokens_in = Counter("alight_prompt_tokens", "Tokens of prompts.", model, registry=registry)
        self._tokens_out = Counter("alight_completion_tokens", "Tokens of answers.", model, registry=registry)
        self._cached = Counter(
            "alight_cached_tokens", "Tokens of prompts found in the KV cache.", model, registry=registry
        )
        self._drafted = Counter(
            "alight_drafted_tokens", "Tokens drafted by speculative decoding.", model, registry=registry
        )
        self._accepted = Counter(
            "alight_accepted_tokens", "Drafted tokens that were right.", model, registry=registry
        )
        registry.register(_Now(models))
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)

    def count(self, method: str, route: str, status: int) -> None:
        """A request has been answered."""
        self._requests.labels(method, route or "none", status).inc()

    def watch(self, model: str, started: float) -> Watch:
        """What is to see the chunks of an answer that was asked for at `started` (monotonic)."""
        return Watch(self, model, started)

    def text(self) -> bytes:
        """All figures in Prometheus' text format. Asks every worker, so it takes a moment."""
        return generate_latest(self._registry)


class Watch:
    """Sees the chunks of one answer as they come."""

    def __init__(self, metrics: Metrics, model: str, started: float) -> None:
        self._metrics = metrics
        self._model = model
        self._first = metrics._first.labels(model)
        self._between = metrics._between.labels(model)
        self._last = started
        self._begun = False

    def see(self, chunk: Chunk) -> None:
        if chunk.tokens or chunk.text:
            now = time.monotonic()
            if self._begun:
                count = len(chunk.tokens) or 1  # several where speculative decoding was right
                for _ in range(count):
                    self._between.observe((now - self._last) / count)
            else:
                self._first.observe(now - self._last)
            self._last, self._begun = now, True
        if chunk.usage:
            own, usage = self._metrics, chunk.usage
            own._answers.labels(self._model).inc()
            own._tokens_in.labels(self._model).inc(usage.prompt_tokens)
            own._tokens_out.labels(self._model).inc(usage.completion_tokens)
            own._cached.labels(self._model).inc(usage.cached_tokens)
            own._drafted.labels(self._model).inc(usage.drafted_tokens)
            own._accepted.labels(self._model).inc(usage.accepted_tokens)


class _Now(Collector):
    """What is asked for when somebody scrapes: the models and the machine."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def describe(self) -> Iterator[Metric]:
        yield from ()  # else the registry would scrape once to learn the names

    def collect(self) -> Iterator[Metric]:
        yield _gauge("alight_info", "The version of alight.", ("version",), [((__version__,), 1)])
        yield from _machine()
        loaded = self._models.loaded()
        yield from _models(loaded)
        crashes = CounterMetricFamily(
            "alight_worker_crashes", "Worker processes that ended by themselves.", labels=("model",)
        )
        for name, count in self._models.crashes().items():
            crashes.add_metric((name,), count)
        yield crashes
        yield from _engines(loaded)


def _models(loaded: tuple[Loaded, ...]) -> Iterator[Metric]:
    figures: list[tuple[str, str, Callable[[Loaded], float]]] = [
        ("alight_running_requests", "Requests that a model works on.", lambda m: m.running),
        ("alight_waiting_requests", "Requests in a model's queue.", lambda m: m.waiting),
        ("alight_slots", "Requests that a model works on at most.", lambda m: m.slots),
        ("alight_model_memory_bytes", "Memory of a model's process.", lambda m: m.memory),
        ("alight_tokens_per_second", "Speed of one answer, of late.", lambda m: m.speed),
    ]
    for name, text, value in figures:
        yield _gauge(name, text, ("model",), [((m.name,), value(m)) for m in loaded])


def _engines(loaded: tuple[Loaded, ...]) -> Iterator[Metric]:
    """What the engines count themselves, by the names that they give it: KV cells, cache hits, drafts, …"""
    families: dict[str, Metric] = {}
    for one in loaded:
        figures: dict[str, float] = {}
        if one.model:
            with suppress(AlightError):  # it crashed, or is too busy to answer
                figures = one.model.metrics()
        for name, value in figures.items():
            full = f"alight_engine_{name}"
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = families.setdefault(full, kind(full, "The engine's own figure.", labels=("model",)))
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            family.add_metric((one.name,), value)
    yield from families.values()


def _machine() -> Iterator[Metric]:
    degrees = machine.temperature()
    if degrees is not None:
        yield _gauge("alight_temperature_celsius", "The hottest part of the machine.", (), [((), degrees)])
    reasons = throttling.reasons()
    if reasons:
        values = [((name,), float(holds)) for name, holds in reasons.items()]
        yield _gauge("alight_throttled", "Whether the board runs slower, and why.", ("reason",), values)
    events = throttling.events()
    if events is not None:
        yield CounterMetricFamily("alight_throttle_events", "Times a core was slowed down.", value=events)


def _gauge(
    name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family
