"""`vlm serve`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_models
from vlm_cli.cli.loading import ModelRequest, QuantizeOption, keep_collecting
from vlm_cli.cli.options import (
    MaxPixelsOption,
    MaxTilesOption,
    PlacementOptions,
    QuietOption,
    SourceOptions,
    flatten_options,
)
from vlm_cli.cli.prompts import ChatTemplateOption
from vlm_cli.errors import UsageError
from vlm_cli.models import DEMO
from vlm_cli.serving.limits import MEGABYTE, Limits
from vlm_cli.writing.choice import TemplateChoice

if TYPE_CHECKING:
    from vlm_cli.media import MediaLoader

__all__ = ["serve"]

NETWORK = "Network"
LIMITS = "Limits"

ServedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Directory that `vlm build` wrote, or hub id.", autocompletion=complete_models
    ),
]


@dataclass(frozen=True)
class NetworkOptions:
    """Where the server listens, and whom it answers."""

    host: Annotated[
        str,
        option(NETWORK, "Listen at HOST. 127.0.0.1 is reached from this machine alone, 0.0.0.0 from others.", "--host"),
    ] = "127.0.0.1"
    port: Annotated[
        int, option(NETWORK, "Listen on port N; 0 takes a free one.", "--port", min=0, max=65535, metavar="N")
    ] = 8000
    api_key: Annotated[
        str | None,
        option(
            NETWORK,
            "Answer only requests that bring KEY, as `Authorization: Bearer KEY`.",
            "--api-key",
            envvar="VLM_API_KEY",
            metavar="KEY",
        ),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        option(NETWORK, "Let pages of ORIGIN use the server (CORS). Repeat for several.", metavar="ORIGIN"),
    ] = None
    allow_urls: Annotated[
        bool, option(NETWORK, "Download pictures that requests name by an http(s):// URL.", "--allow-urls")
    ] = False
    name: Annotated[
        str | None, option(NETWORK, "Name of the model for clients; by default MODEL.", "--name", metavar="NAME")
    ] = None


@dataclass(frozen=True)
class LimitOptions:
    """What the server does at once, and what it takes of one request."""

    batch_size: Annotated[
        int, option(LIMITS, "Write at most N answers together.", "--batch-size", min=1, max=1024, metavar="N")
    ] = 8
    queue: Annotated[
        int,
        option(LIMITS, "Let at most N answers wait; further requests get status 429.", min=1, max=100_000, metavar="N"),
    ] = 64
    timeout: Annotated[float, option(LIMITS, "End a request after N seconds.", min=1.0, max=86_400.0, metavar="N")] = (
        300.0
    )
    max_body: Annotated[int, option(LIMITS, "Take requests of at most N megabytes.", min=1, max=4096, metavar="N")] = 32
    max_images: Annotated[
        int, option(LIMITS, "Take at most N images and clips in a request.", min=0, max=10_000, metavar="N")
    ] = 64
    max_new_tokens: Annotated[
        int,
        option(
            LIMITS,
            "Write at most N tokens where a request asks for no number.",
            "--max-new-tokens",
            "-n",
            min=1,
            max=100_000,
            metavar="N",
        ),
    ] = 256
    temperature: Annotated[
        float,
        option(
            LIMITS,
            "Temperature of requests that name none; 0 takes the most likely token each time.",
            min=0.0,
            max=2.0,
            metavar="X",
        ),
    ] = 0.0
    max_pixels: MaxPixelsOption = None
    max_tiles: MaxTilesOption = None

    @property
    def of_requests(self) -> Limits:
        """What one request may use."""
        return Limits(
            body=self.max_body * MEGABYTE,
            images=self.max_images,
            new_tokens=self.max_new_tokens,
            seconds=self.timeout,
        )


@flatten_options
def serve(
    model: ServedModel = DEMO.name,
    *,
    network: NetworkOptions = NetworkOptions(),
    limits: LimitOptions = LimitOptions(),
    chat_template: ChatTemplateOption = "auto",
    devices: PlacementOptions = PlacementOptions(),
    quantize: QuantizeOption = None,
    source: SourceOptions = SourceOptions(),
    quiet: QuietOption = False,
) -> None:
    """Answer other programs over HTTP, in OpenAI's protocol. Needs `pip install 'vlm-cli[serve]'`.

    A client asks at http://127.0.0.1:8000/v1; the page at http://127.0.0.1:8000 is a chat for people. Each request is
    one line of JSON on stderr. Ctrl-C or SIGTERM ends the server when the answers that run are written.

    Example: vlm serve my-llava --port 8000
    """
    _check_installed()
    from vlm_cli.serving.server import dump_line, is_loopback, open_socket, run
    from vlm_cli.serving.service import make_service

    wanted = ModelRequest.of(model, devices, source, quantize=quantize, max_tiles=limits.max_tiles)
    choice = TemplateChoice.parse(chat_template)
    host = network.host
    with open_socket(host, network.port) as listener:
        loaded = wanted.load()
        keep_collecting()
        service = make_service(
            loaded.model,
            loaded.processor,
            network.name or model,
            limits=limits.of_requests,
            choice=choice,
            make_loader=partial(_make_loader, network.allow_urls, source.allow_hosts, limits.max_pixels),
            batch_size=limits.batch_size,
            queue=limits.queue,
            temperature=limits.temperature,
            api_key=network.api_key,
            tell=console.notify,
            log=lambda line: console.note(dump_line(line)),
        )
        place = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        console.notify(f"Serving {service.name} at http://{place} (API: http://{place}/v1). Ctrl-C ends the server.")
        if not is_loopback(host) and network.api_key is None:
            console.note("Note: whoever reaches this address may use the server; --api-key asks for a key.")
        run(service, listener, host=host, origins=tuple(network.allow_origin or ()))


def _check_installed() -> None:
    """Check that the libraries of the server are there.

    Raises:
        UsageError: naming those that are not.
    """
    missing = [x for x in ("starlette", "uvicorn", "prometheus_client") if find_spec(x) is None]
    if missing:
        raise UsageError(
            f"`vlm serve` needs {', '.join(missing)}, which this environment lacks: pip install 'vlm-cli[serve]'"
        )


def _make_loader(allow_urls: bool, allow_hosts: tuple[str, ...], max_pixels: int | None) -> MediaLoader:
    from vlm_cli.media import MediaLoader

    return MediaLoader(allow_urls=allow_urls, allow_hosts=allow_hosts, max_pixels=max_pixels)
