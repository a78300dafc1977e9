"""What Prometheus reads at /metrics.

The gateway's own numbers are observed while tokens pass, so a histogram here is a list of counts; the workers' and the
router's are read from the router when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Info, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from ..common.errors import BatonError

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Counts by upper bound, in seconds. Only the event loop's thread observes."""

    __slots__ = ("_bounds", "_counts", "_help", "_name", "_sum")

    def __init__(self, name: str, help: str, bounds: tuple[float, ...] = _LATENCY) -> None:
        self._name = name
        self._help = help
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += times
        self._sum += seconds * times

    def family(self) -> HistogramMetricFamily:
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(self._name, self._help, buckets=buckets, sum_value=self._sum)


class Metrics:
    """The numbers of the gateway `name`. `extra` adds what the router tells."""

    def __init__(self, name: str, extra: Collector) -> None:
        self.ttft = Histogram("baton_time_to_first_token_seconds", "From a request's arrival to its first token.")
        self.itl = Histogram("baton_inter_token_latency_seconds", "Between two tokens of one stream, at the gateway.")
        self.e2e = Histogram("baton_request_seconds", "From a request's arrival to its last token.")
        self.queue_wait = Histogram("baton_queue_wait_seconds", "From a request's arrival to the start of its prefill.")
        self.registry = CollectorRegistry()
        self.prompt_tokens = self._counter("baton_prompt_tokens", "Prompt tokens of finished requests.")
        self.cached_tokens = self._counter("baton_cached_prompt_tokens", "Those of them found in a prefix cache.")
        self.output_tokens = self._counter("baton_output_tokens", "Output tokens that reached the gateway.")
        self.requests = Counter(
            "baton_requests", "HTTP requests for text, by how they ended.", ["outcome"], registry=self.registry
        )
        Info("baton_gateway", "Which gateway answers here: several may share a port.", registry=self.registry).info(
            {"name": name, "version": version("baton")}
        )
        self.registry.register(_Histograms((self.ttft, self.itl, self.e2e, self.queue_wait)))
        self.registry.register(extra)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count a request that ends here with a `BatonError`, before anything was generated for it."""
        try:
            yield
        except BatonError as error:
            self.requests.labels(error.code).inc()
            raise

    def arrived(self, waited_s: float, tokens: int, *, first: bool) -> None:
        """Tokens of one stream that came together, `waited_s` after those before them."""
        (self.ttft if first else self.itl).observe(waited_s)
        if tokens > 1:
            self.itl.observe(0.0, tokens - 1)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(name, help, registry=self.registry)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _Histograms(Collector):
    def __init__(self, histograms: tuple[Histogram, ...]) -> None:
        self._histograms = histograms

    def collect(self) -> Iterator[HistogramMetricFamily]:
        return (histogram.family() for histogram in self._histograms)
