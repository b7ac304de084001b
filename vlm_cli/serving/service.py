"""What the addresses of a server share: a model that answers, its limits, and what the server tells."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_cli.media import MediaLoader
from vlm_cli.serving.engine import Engine
from vlm_cli.serving.limits import Limits
from vlm_cli.serving.metrics import Metrics
from vlm_cli.serving.preparing import Preparer, make_plan
from vlm_cli.serving.spelling import Speller
from vlm_cli.writing.choice import AUTO, TemplateChoice

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor

__all__ = ["Service", "make_service"]


@dataclass
class Service:
    """What the addresses need.

    Attributes:
        name: of the model, as clients name it.
        engine: answers rows.
        preparer: makes rows of requests.
        limits: of a request.
        temperature: of a request that names none.
        api_key: that a client has to send; None asks for none.
        spell: turns a token into its text and bytes.
        metrics: numbers for Prometheus.
        log: receives one mapping for each request.
        created: time of the start, in seconds since 1970.
    """

    name: str
    engine: Engine
    preparer: Preparer
    limits: Limits
    temperature: float
    api_key: str | None
    spell: Callable[[int], tuple[str, bytes]]
    metrics: Metrics
    log: Callable[[dict[str, Any]], None]
    created: int = 0


def make_service(
    model: VLM,
    processor: VLMProcessor,
    name: str,
    *,
    limits: Limits = Limits(),
    choice: TemplateChoice = AUTO,
    make_loader: Callable[[], MediaLoader] = MediaLoader,
    batch_size: int = 8,
    queue: int = 64,
    temperature: float = 0.0,
    api_key: str | None = None,
    tell: Callable[[str], None] = lambda message: None,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Service:
    """Make what a server needs to answer with one model.

    Args:
        model: the VLM.
        processor: its processor.
        name: of the model, as clients name it.
        limits: of a request.
        choice: whether the chat template writes messages.
        make_loader: returns what fetches and decodes the media of one request.
        batch_size: answers that are written together, at most.
        queue: answers that may wait.
        temperature: of a request that names none.
        api_key: that a client has to send.
        tell: receives what whoever runs the server should know.
        log: receives one mapping for each request.
    """
    plan = make_plan(model, processor, limits, choice)
    return Service(
        name=name,
        engine=Engine(plan, batch_size=batch_size, queue=queue, tell=tell),
        preparer=Preparer(plan, limits, make_loader),
        limits=limits,
        temperature=temperature,
        api_key=api_key,
        spell=Speller(processor.tokenizer),
        metrics=Metrics(),
        log=log,
        created=int(time.time()),
    )
