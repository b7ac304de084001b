"""Numbers of a running server, in the format of Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from vlm_cli.serving.engine import Load
    from vlm_cli.serving.replies import Reply

__all__ = ["Metrics"]

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts what a server does."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._requests = Counter("vlm_requests", "Requests by address and status.", ["path", "status"], registry=own)
        self._seconds = Histogram("vlm_request_seconds", "Time of a request.", ["path"], buckets=SECONDS, registry=own)
        self._first = Histogram("vlm_first_token_seconds", "Time to the first token.", buckets=SECONDS, registry=own)
        self._prompt = Counter("vlm_prompt_tokens", "Positions of prompts, images included.", registry=own)
        self._written = Counter("vlm_generated_tokens", "Tokens of answers.", registry=own)
        self._images = Counter("vlm_images", "Images and clips of prompts.", registry=own)
        self._running = Gauge("vlm_answers_running", "Answers that the model writes now.", registry=own)
        self._waiting = Gauge("vlm_answers_waiting", "Answers that wait for the model.", registry=own)
        self._batches = Gauge("vlm_batches", "Groups of answers that were written together.", registry=own)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_answer(self, reply: Reply) -> None:
        """Count what an answered request has used."""
        if reply.first_token is not None:
            self._first.observe(reply.first_token)
        self._prompt.inc(reply.prepared.prompt_tokens)
        self._written.inc(reply.completion_tokens)
        self._images.inc(len(reply.prepared.media))

    def write(self, load: Load) -> tuple[bytes, str]:
        """Return the text and its type."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._batches.set(load.batches)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
