"""What /metrics shows: one set of objects that both front doors count into.

Names are those of the field (vLLM's, with our prefix), so existing dashboards need one word
changed. Gauges are read from the gateway when somebody asks; nothing is sampled in between.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from serving.api.status import status_of
from serving.cluster.generation import GatewayInfo
from serving.engine.request import FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0,
)  # fmt: skip
_REQUEST_S = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0,
)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_FINISHED = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.FAILED: "error",
    FinishReason.DEADLINE: "deadline",
}


class Observed(Protocol):
    """What the metrics read of a delta: a `Delta` as well as a `TextDelta` is one."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """New tokens."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        ...

    @property
    def finish(self) -> FinishReason | None:
        """The end, on the last delta."""
        ...

    @property
    def attempt(self) -> int:
        """The placement that made the tokens, from 1; 0 if there was none."""
        ...


class ServingMetrics:
    """The metric objects of one gateway, in a registry of their own."""

    def __init__(self, model_name: str, info: Callable[[], GatewayInfo]) -> None:
        self.registry = CollectorRegistry()
        self._label = {"model_name": model_name}
        self.registry.register(_FleetGauges(model_name, info))
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache."
        )
        self.attempts = self._counter("request_attempts", "Placements of requests on replicas.")
        self.resubmissions = self._counter(
            "request_resubmissions", "Placements after a first one was lost or moved."
        )
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_S
        )
        self.inter_token_s = self._histogram(
            "inter_token_latency_seconds", "Each gap between tokens of a request.", _TOKEN_S
        )
        self.time_per_output_token_s = self._histogram(
            "request_time_per_output_token_seconds", "Mean gap of a request.", _TOKEN_S
        )
        self.request_s = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end of a request.", _REQUEST_S
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a request.", _TOKENS
        )
        finished = Counter(
            "lumen:request_success",
            "Requests that ended, by reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self.finished = {
            reason: finished.labels(model_name=model_name, finished_reason=word)
            for reason, word in _FINISHED.items()
        }
        self._refused = Counter(
            "lumen:request_refused",
            "Requests refused before they were accepted, by error code.",
            ("model_name", "code"),
            registry=self.registry,
        )

    def refused(self, error: BaseException) -> None:
        """Count a request that was not accepted."""
        code = status_of(error).openai_code or "error"
        self._refused.labels(**self._label, code=code).inc()

    def accepted(self, prompt_tokens: int, arrived: float) -> "RequestObserver":
        """Begin to observe an accepted request. arrived: on the clock of `observe`, seconds."""
        self.attempts.inc()
        return RequestObserver(self, prompt_tokens, arrived, attempt=1)

    def resumed(self, arrived: float) -> "RequestObserver":
        """Begin to observe a stream attached by Resume: its prompt was counted before."""
        return RequestObserver(self, 0, arrived, attempt=None)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format (CONTENT_TYPE)."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        whole = Counter(f"lumen:{name}", text, ("model_name",), registry=self.registry)
        return whole.labels(**self._label)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        whole = Histogram(
            f"lumen:{name}", text, ("model_name",), buckets=buckets, registry=self.registry
        )
        return whole.labels(**self._label)


class RequestObserver:
    """One request as its client sees it; a front door calls it for every delta.

    attempt: the placement last seen; None takes that of the first delta.
    """

    def __init__(
        self, metrics: ServingMetrics, prompt_tokens: int, arrived: float, attempt: int | None
    ) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._arrived = arrived
        self._first: float | None = None  # when the first token came
        self._last = arrived  # when the last delta with tokens came
        self._generated = 0
        self._attempt = attempt
        self._ended = False

    def observe(self, delta: Observed, now: float) -> None:
        """A delta goes to the client. Tokens of one delta arrive together, with no gap between."""
        metrics = self._metrics
        more = 0 if self._attempt is None else max(0, delta.attempt - self._attempt)
        if more:
            metrics.attempts.inc(more)
            metrics.resubmissions.inc(more)
        self._attempt = max(delta.attempt, self._attempt or 0)
        if delta.tokens:
            if self._first is None:
                self._first = now
                metrics.first_token_s.observe(now - self._arrived)
                metrics.prompt_tokens.inc(self._prompt_tokens)
                metrics.prefix_queries.inc(self._prompt_tokens)
                metrics.prefix_hits.inc(delta.cached_tokens)
            else:
                metrics.inter_token_s.observe(now - self._last)
            for _ in range(len(delta.tokens) - 1):
                metrics.inter_token_s.observe(0.0)
            self._last = now
            self._generated += len(delta.tokens)
            metrics.generation_tokens.inc(len(delta.tokens))
        if delta.finish is not None:
            self.ended(delta.finish, now)

    def ended(self, reason: FinishReason, now: float) -> None:
        """The request is over for this client. CANCELLED: it went away. Only the first counts."""
        if self._ended:
            return
        self._ended = True
        metrics = self._metrics
        metrics.finished[reason].inc()
        metrics.request_s.observe(now - self._arrived)
        metrics.request_prompt_tokens.observe(self._prompt_tokens)
        metrics.request_generation_tokens.observe(self._generated)
        if self._first is not None and self._generated > 1:
            mean = (self._last - self._first) / (self._generated - 1)
            metrics.time_per_output_token_s.observe(mean)


class _FleetGauges(Collector):
    """Gauges of the gateway and of every replica's last load report."""

    def __init__(self, model_name: str, info: Callable[[], GatewayInfo]) -> None:
        self._model_name = model_name
        self._info = info

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing: the gateway need not be there yet when the collector is registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the gateway's state now."""
        info = self._info()
        for name, text, value in (
            ("gateway_requests_queued", "Accepted requests not yet placed.", info.queued),
            ("gateway_requests_placed", "Requests placed on a replica.", info.running),
            ("gateway_ready", "1 if a healthy replica is connected.", int(info.ready)),
            ("gateway_draining", "1 while no new requests are taken.", int(info.draining)),
        ):
            gauge = GaugeMetricFamily(f"lumen:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        labels = ["model_name", "worker", "replica"]
        running = GaugeMetricFamily("lumen:num_requests_running", "In the batch.", labels=labels)
        waiting = GaugeMetricFamily("lumen:num_requests_waiting", "Not in it yet.", labels=labels)
        usage = GaugeMetricFamily(
            "lumen:kv_cache_usage_perc",
            "Share of KV blocks in use, 0 to 1; cached blocks are not in use.",
            labels=labels,
        )
        for worker in info.fleet.workers:
            for load in worker.replicas:
                key = [self._model_name, worker.worker_id, str(load.replica)]
                used = load.total_blocks - load.free_blocks - load.cached_blocks
                running.add_metric(key, load.running)
                waiting.add_metric(key, load.waiting)
                usage.add_metric(key, used / load.total_blocks if load.total_blocks else 0.0)
        yield from (running, waiting, usage)
