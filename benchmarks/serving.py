"""How fast `vlm serve` answers: many clients beside one, and the time to the first token, on the demo.

python -m benchmarks.serving             prints a table
"""

from __future__ import annotations

import base64
import json
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

PICTURES = Path(__file__).parents[1] / "examples" / "images"
NAMES = ("one.png", "two.png", "three.png")
REQUESTS, CLIENTS = 500, 16


def question(number: int) -> bytes:
    """The body of a request that streams."""
    data = base64.b64encode((PICTURES / NAMES[number % len(NAMES)]).read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content: list[Any] = [picture, {"type": "text", "text": "Describe the image."}]
    message = {"role": "user", "content": content}
    return json.dumps({"messages": [message], "stream": True}).encode()


def ask(port: int, number: int) -> float:
    """Ask once; return the seconds to the first word."""
    connection = HTTPConnection("127.0.0.1", port)
    started = time.monotonic()
    connection.request("POST", "/v1/chat/completions", question(number), {"Content-Type": "application/json"})
    response, first = connection.getresponse(), 0.0
    while line := response.readline():
        if not first and b'"content":" ' in line:
            first = time.monotonic() - started
    connection.close()
    return first


def measure(port: int, clients: int) -> tuple[float, list[float]]:
    """Answers per second, and the seconds to the first word of each."""
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        first = list(pool.map(lambda k: ask(port, k), range(REQUESTS)))
    return REQUESTS / (time.monotonic() - started), first


def main() -> None:
    import torch

    from vlm_cli import load
    from vlm_cli.serving.server import make_server
    from vlm_cli.serving.service import make_service

    torch.set_num_threads(1)
    service = make_service(*load("demo"), "demo")
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(service, host="127.0.0.1")
    service.engine.start()
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    ask(port, 0)
    rates = {}
    for clients in (1, CLIENTS):
        rates[clients], first = measure(port, clients)
        tail = statistics.quantiles(first, n=20)[-1]
        middle = statistics.median(first)
        rate = f"{rates[clients]:.1f} answers a second"
        print(f"{clients:>3} clients  {rate}  first word: median {middle:.3f} s, 95 % within {tail:.3f} s")
    print(f"answers per second, {CLIENTS} clients ÷ 1: {rates[CLIENTS] / rates[1]:.2f}")
    server.should_exit = True
    thread.join()
    service.engine.close()


if __name__ == "__main__":
    main()
