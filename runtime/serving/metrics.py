"""Figures of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from edgeskip.runtime.decoding.statistics import Statistics
from edgeskip.runtime.serving.worker import Worker

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1)


class Metrics:
    """Counts of requests and tokens, times, and what waits."""

    def __init__(self, worker: Worker) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "edgeskip_requests",
            "Requests by path and status; 499 is a client that left.",
            ["path", "status"],
            registry=registry,
        )
        self._prompt, self._cached, self._new, self._drafted, self._accepted = (
            Counter(f"edgeskip_{name}_tokens", text, registry=registry)
            for name, text in (
                ("prompt", "Tokens of prompts."),
                ("cached_prompt", "Tokens of prompts that needed no computing."),
                ("generated", "Tokens of answers."),
                ("drafted", "Tokens that the early layers drafted."),
                ("accepted", "Drafted tokens that verification confirmed."),
            )
        )
        self.first_token = Histogram(
            "edgeskip_time_to_first_token_seconds",
            "From a request to its first text, with its time in the queue.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._per_token = Histogram(
            "edgeskip_time_per_output_token_seconds",
            "Mean time for each token after the first.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        Gauge("edgeskip_waiting_requests", "Requests in the queue.", registry=registry).set_function(
            lambda: worker.waiting
        )
        Gauge("edgeskip_decoding", "1 while a text is being decoded.", registry=registry).set_function(
            lambda: worker.is_decoding
        )

    def add(self, statistics: Statistics) -> None:
        """Counts a generation."""
        self._prompt.inc(statistics.prompt_tokens)
        self._cached.inc(statistics.cached_tokens)
        self._new.inc(statistics.new_tokens)
        self._drafted.inc(statistics.drafted)
        self._accepted.inc(statistics.accepted)
        if statistics.ms_per_token is not None:
            self._per_token.observe(statistics.ms_per_token / 1e3)

    def text(self) -> bytes:
        """All figures, in Prometheus' format."""
        return generate_latest(self._registry)
