"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters, gauges and histograms of one server; their help texts say what they mean."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.replies = Counter("klfast_replies", "HTTP replies.", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("klfast_prompt_tokens", "Tokens of prompts that ran.", registry=registry)
        self.cached_tokens = Counter(
            "klfast_cached_prompt_tokens", "Tokens of prompts that the prefix cache had.", registry=registry
        )
        self.answer_tokens = Counter("klfast_answer_tokens", "Tokens of answers.", registry=registry)
        self.answers = Counter("klfast_answers", "Answers by how they ended.", ["end"], registry=registry)
        self.running = Gauge("klfast_running_answers", "Answers that are being written.", registry=registry)
        self.waiting = Gauge("klfast_waiting_answers", "Answers in the queue.", registry=registry)
        self.cache_bytes = Gauge("klfast_prefix_cache_bytes", "Memory of the prefix cache.", registry=registry)
        self.first_token = Histogram(
            "klfast_first_token_seconds", "From request to first token.", buckets=_SECONDS, registry=registry
        )
        self.step = Histogram(
            "klfast_step_seconds", "One token of each running answer.", buckets=_SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """Return all of them in Prometheus's text format."""
        return generate_latest(self._registry)
