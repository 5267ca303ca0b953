"""``klfast serve``: many clients at once, and the next turn of a chat with and without the prefix cache.

A server in a process of its own, on the machine's cores, which its clients share. Every client streams; prompts are
never repeated, so that the prefix cache does not shorten them where it is not the matter.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import random
from collections.abc import Iterator

import torch

from klfast.benchkit.runner import Contender, Group, UnavailableError
from klfast.benchkit.settings import Settings

from . import servers
from .servers import Reply, Server
from .whole_models import rate

MODELS = ("mamba-130m", "granite-4.0-h-350m")
LENGTHS = (32, 128)  # of prompts, in tokens
CHECKED = 8  # clients
NEW_IN_TURN = 16  # tokens of a turn


def groups(settings: Settings) -> Iterator[Group]:
    names, clients, new, before = (
        (("mamba-tiny",), (1, 4), 4, 96) if settings.quick else (MODELS, (1, 8, 16, 64), 32, 1024)
    )
    for name in filter(settings.takes, names):
        for number in clients:
            yield Group(
                f"{name}, {number} at once, {new} tokens each",
                {"model": name, "clients": number, "tokens": new},
                {"klfast int4": functools.partial(_load, name, number, new, settings)},
            )
        yield Group(
            f"{name}, first token of a turn after {before} tokens",
            {"model": name, "tokens": NEW_IN_TURN},
            {
                title: functools.partial(_turn, name, before, settings, caches)
                for title, caches in (("klfast int4, prefix cache", True), ("without prefix cache", False))
            },
        )


@functools.lru_cache(maxsize=2)
def _server(name: str, threads: int, caches: bool) -> Server:
    options = ["--dtype", "bfloat16", "--threads", str(threads), *([] if caches else ["--prefix-cache", "0"])]
    return Server(servers.folder(name), *options)


def _started(name: str, settings: Settings, caches: bool) -> Server:
    if settings.device != "cpu":
        raise UnavailableError("klfast serve runs on the CPU only")
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"klfast serve needs the package {package}; pip install 'klfast[serve]'")
    return _server(name, settings.threads, caches)


def _load(name: str, clients: int, new: int, settings: Settings) -> Contender:
    server, chance = _started(name, settings, caches=True), random.Random(clients)
    replies: list[Reply] = []

    def prompts(number: int) -> list[str]:
        return [servers.prompt(chance, chance.randint(*LENGTHS)) for _ in range(number)]

    def error() -> float:
        """Return the share of answers that are not whole, or do not begin as alone without the cache.

        In bfloat16, later tokens of random weights depend on how many sequences go through the model together.
        """
        texts, alone = prompts(CHECKED), _started(name, settings, caches=False)
        found = server.ask_all(texts, new)
        right = [
            len(one.arrived) == new and one.text.split()[0] == alone.ask(text, 1).text.strip()
            for text, one in zip(texts, found, strict=True)
        ]
        return 1 - sum(right) / CHECKED

    def facts(seconds: float) -> dict[str, float]:
        first, between = [one.first_s for one in replies], [gap for one in replies for gap in one.between_s]
        return rate(clients * new)(seconds) | {
            f"{title}_p{percent}_ms": round(1e3 * float(torch.tensor(taken).quantile(percent / 100)), 2)
            for title, taken in (("first", first), ("between", between))
            for percent in (50, 99)
        }

    return Contender([lambda: replies.extend(server.ask_all(prompts(clients), new))], error, 0.0, facts=facts)


def _turn(name: str, before: int, settings: Settings, caches: bool) -> Contender:
    server, chance = _started(name, settings, caches), random.Random(0)
    history = servers.prompt(chance, before - NEW_IN_TURN)
    history += server.ask(history, NEW_IN_TURN).text

    def ask() -> Reply:
        return server.ask(f"{history} {servers.prompt(chance, NEW_IN_TURN)}", 1)

    def error() -> float:
        """Return 0 if the server had all of the history but the answer's last token, or nothing, as it should."""
        return 0.0 if ask().cached_tokens == (before - 1 if caches else 0) else math.inf

    return Contender([ask], error, 0.0)


def test_serve(group, name, run, benchmark):
    run.time("serve", group, name, benchmark)
