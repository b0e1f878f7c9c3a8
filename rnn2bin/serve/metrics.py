"""Figures for Prometheus: each service keeps its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rnn2bin.serve.store import Store

MEDIA = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    def __init__(self, store: Store, streams: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self.requests = Counter("rnn2bin_http_requests", "Answers given", labels, registry=self.registry)
        self.seconds = Histogram(
            "rnn2bin_http_seconds", "Seconds until an answer begins", ("route",), buckets=BOUNDS, registry=self.registry
        )
        self.uploaded = Counter("rnn2bin_uploaded_bytes", "Bytes of whole uploads", registry=self.registry)
        self.registry.register(_Now(store, streams))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Now(Collector):
    """What is looked up when it is asked for."""

    def __init__(self, store: Store, streams: Callable[[], int]) -> None:
        self.store, self.streams = store, streams

    def collect(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily("rnn2bin_conversions", "Conversions by state", labels=["state"])
        for state, count in self.store.counts().items():
            jobs.add_metric([state], count)
        yield jobs
        yield GaugeMetricFamily("rnn2bin_workers", "Workers that give signs of life", value=len(self.store.list_workers()))
        yield GaugeMetricFamily("rnn2bin_event_streams", "Open event streams of this process", value=self.streams())

    def describe(self) -> Iterable[Metric]:
        return []
