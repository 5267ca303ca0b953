"""How long clients of ``klfast serve`` wait: alone, beside hostile ones, and after them.

The server is a process of its own, with a tiny model of random weights: what is measured is the server, not the engine.
Its clients and the hostile ones are threads of another process on the same cores.

    python -m klfast.bench.server_load --out bench/results/server_load.md
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.reporting.table import Table

from . import servers
from .leaks import resident

MODEL = "mamba-tiny"
CLIENTS, PROMPT, NEW = 8, 16, 8
HALF_REQUESTS, UNREAD, MANY = 900, 4, 16
HEADINGS = ("requests", "number", *(f"{what} ms" for what in ("p50", "p99", "longest")), "first token, p99 ms", "MB")
_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_MALFORMED = b'{"model": "x", "prompt": [' + b"{}," * 300_000 + b"1]}"
_LONG = {"prompt": "w1", "max_tokens": 8000, "n": MANY, "stream": True, "logprobs": 20}


class Hostile:
    """Clients that go on until ``stop``: half requests, unread streams, bodies of 100 MB, malformed ones of 900 KB.

    Args:
        server: whom they ask.
    """

    def __init__(self, server: servers.Server) -> None:
        self._address, self._ends = server.address, threading.Event()
        self._held = [self._connected(_HEAD[:40]) for _ in range(HALF_REQUESTS)]
        long = json.dumps({"model": server.model, **_LONG}).encode()
        self._held += [self._connected(_HEAD % len(long) + long) for _ in range(UNREAD)]
        self._threads = [threading.Thread(target=self._repeat, args=(one,)) for one in (self._flood, self._malformed)]
        for one in self._threads:
            one.start()

    def stop(self) -> None:
        """End them all."""
        self._ends.set()
        for thread in self._threads:
            thread.join()
        for connection in self._held:
            connection.close()

    def _connected(self, sent: bytes) -> socket.socket:
        host, port = self._address.split(":")
        made = socket.create_connection((host, int(port)), timeout=60)
        made.sendall(sent)
        return made

    def _repeat(self, act: Callable[[], None]) -> None:
        while not self._ends.wait(0.2):
            act()

    def _flood(self) -> None:
        with suppress(OSError), self._connected(_HEAD % (100 * 2**20)) as connection:
            for _ in range(100):
                connection.sendall(bytes(2**20))

    def _malformed(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        connection.request("POST", "/v1/completions", _MALFORMED, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 400
        connection.close()


def measure(requests: int) -> Table:
    """Return times of so many requests alone, and of a tenth of them beside and after hostile clients."""
    server, chance, rows = servers.Server(servers.folder(MODEL), "--prefix-cache", "16MB"), random.Random(0), []

    def phase(name: str, number: int) -> None:
        replies = server.ask_all([servers.prompt(chance, PROMPT) for _ in range(number)], NEW, CLIENTS)
        whole = 1e3 * torch.tensor([reply.arrived[-1] - reply.asked for reply in replies])
        first = 1e3 * torch.tensor([reply.first_s for reply in replies])
        times = (*(whole.quantile(q) for q in (0.5, 0.99, 1)), first.quantile(0.99))
        rows.append((name, number, *(round(float(one), 1) for one in times), round(resident(server.process) / 1e6)))

    server.ask_all([servers.prompt(chance, PROMPT) for _ in range(100)], NEW, CLIENTS)
    phase("alone", requests)
    hostile = Hostile(server)
    try:
        phase("beside hostile clients", requests // 10)
    finally:
        hostile.stop()
    phase("after them", requests // 10)
    return Table(f"{CLIENTS} clients, prompts of {PROMPT} tokens, {NEW} new ones each, streamed", HEADINGS, tuple(rows))


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=3000, help="alone; a tenth of them beside hostile clients")
    arguments = parser.parse_args()
    table = measure(arguments.requests)
    conditions = (
        f"`python -m klfast.bench.server_load` on {cpu_name()}, {torch.get_num_threads()} threads, klfast "
        f"{klfast.__version__}, torch {torch.__version__}. Hostile: {HALF_REQUESTS} half requests, {UNREAD} streams "
        f"of {MANY} answers that nobody reads, and, each at most five times a second, a body of 100 MB and a malformed "
        "one of 900 KB. Clients, hostile ones and server share the cores."
    )
    write_atomic(arguments.out, "\n".join(["# klfast serve under load\n", f"{conditions}\n", table.markdown()]))


if __name__ == "__main__":
    main()
