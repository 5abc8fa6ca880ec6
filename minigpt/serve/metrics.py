"""What Prometheus is told. No label holds anything of a request but its route and what became of it."""

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import Span, StageReport

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_GAUGES = {  # by the field of a report
    "uptime": ("uptime", "seconds since the stage started."),
    "weights_bytes": ("weights_bytes", "bytes of its weights."),
    "channels": ("channels", "its open links."),
    "sequences": ("sequences", "sequences that have a place."),
    "queue": ("queue", "requests that wait for a place."),
    "rate": ("tokens_per_second", "tokens drawn a second, over the last 10 s."),
    "batch": ("batch", "sequences in a pass, the mean over the last 10 s."),
    "cache_bytes": ("cache_bytes", "bytes of all caches."),
    "cache_limit": ("cache_limit_bytes", "bytes that all caches may have; 0 if only sequences are limited."),
}
_COUNTERS = {
    "steps": ("steps", "passes asked for since the stage started."),
    "tokens": ("tokens", "tokens drawn since then, for passes through this stage."),
    "resumed": ("resumed", "requests since then that went on after a link was lost."),
}


class _Stages(Collector):
    """What the stages report of themselves. One that does not answer has no figures but that, and one to which this
    client is no operator has few: a counter that fell to 0 would look like a restart."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.reports: Sequence[StageReport] = ()
        self.restarts: Sequence[int] = ()

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("minigpt_stage_up", "Whether the stage answers.", labels=["stage"])
        for report in self.reports:
            up.add_metric([str(report.stage)], not report.error)
        yield up
        again = CounterMetricFamily(
            "minigpt_stage_restarts",
            "How often the stage ended and was started again; of local stages.",
            labels=["stage"],
        )
        for stage, count in enumerate(self.restarts):
            again.add_metric([str(stage)], count)
        yield again
        left = GaugeMetricFamily(
            "minigpt_stage_endorsements_expire_days",
            "Days until the first endorsement of its evidence ends; 0 if the evidence is not accepted any more.",
            labels=["stage"],
        )
        for report in self.reports:
            days = self._manifest.endorsed_days(report.stage, report.evidence)
            if days is not None:
                left.add_metric([str(report.stage)], days)
        yield left
        for kind, fields in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for field, (name, words) in fields.items():
                family = kind(f"minigpt_stage_{name}", f"As the stage reports: {words}", labels=["stage"])
                for report in self.reports:
                    if not report.error and (figure := getattr(report, field)) is not None:
                        family.add_metric([str(report.stage)], figure)
                yield family


class Metrics:
    """The figures of one server.

    Args:
        load: how many answers are under way, and how many requests wait.
    """

    def __init__(self, manifest: Manifest, load: Callable[[], tuple[int, int]]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asks for
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "minigpt_requests", "HTTP requests by route and status.", ("route", "status"), registry=registry
        )
        self.prompt_tokens = Counter("minigpt_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.tokens = Counter("minigpt_generated_tokens", "Tokens generated for requests.", registry=registry)
        self.resumed = Counter(
            "minigpt_resumed", "Times that an answer went on after a link or a stage had died.", registry=registry
        )
        self.first = Histogram(
            "minigpt_time_to_first_token_seconds", "From request to first token, with the wait in the queue.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.between = Histogram(
            "minigpt_inter_token_seconds", "From token to token of one answer.", buckets=_SECONDS, registry=registry
        )
        running = Gauge("minigpt_answers_running", "Answers under way.", registry=registry)
        running.set_function(lambda: load()[0])
        waiting = Gauge("minigpt_requests_waiting", "Requests in the queue.", registry=registry)
        waiting.set_function(lambda: load()[1])
        expires = Gauge("minigpt_manifest_expires_days", "Days until the manifest expires.", registry=registry)
        expires.set_function(lambda: (manifest.expires.timestamp() - time.time()) / 86_400)
        self._link = Counter(
            "minigpt_link_bytes", "Ciphertext of answers, both ways; link i leads to stage i.", ("link",),
            registry=registry,
        )  # fmt: skip
        self._stages = _Stages(manifest)
        registry.register(self._stages)

    def crossed(self, spans: Sequence[Span]) -> None:
        """Counts what a token's messages took on each link."""
        for link, span in enumerate(spans[:-1]):  # the last stage has no next one
            self._link.labels(link).inc(span.bytes)

    def show(self, reports: Sequence[StageReport], restarts: Sequence[int]) -> bytes:
        """All of it, in Prometheus's text format."""
        self._stages.reports, self._stages.restarts = reports, restarts
        return generate_latest(self.registry)
