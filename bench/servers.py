"""``klfast serve`` in a process of its own, with a model of random weights, and clients that stream its answers."""

from __future__ import annotations

import atexit
import functools
import http.client
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import klfast
from klfast.quant.spec import QuantSpec

from . import models

_SECONDS = 600  # that a client waits


@dataclass(frozen=True)
class Reply:
    """An answer as its client saw it.

    Attributes:
        text: words, one a token.
        asked: when the request was sent, in seconds of ``time.perf_counter``.
        arrived: when each token arrived.
        cached_tokens: tokens of the prompt that the server did not have to run.
    """

    text: str
    asked: float
    arrived: list[float]
    cached_tokens: int

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.arrived[0] - self.asked

    @property
    def between_s(self) -> list[float]:
        """Seconds from each token to the next."""
        return [after - before for before, after in itertools.pairwise(self.arrived)]


class Server:
    """A server, until it is forgotten.

    Args:
        folder: of the model.
        options: of the command.

    Attributes:
        model: what clients call the model.
        address: its host and port.
        process: the process's number.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "klfast", "serve", str(folder), "--port", "0", "--json", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        weakref.finalize(self, _end, process)
        said = ""
        for line in process.stdout:
            said += line
            if line == "}\n":
                break
        else:
            raise RuntimeError(f"klfast serve ended with status {process.wait()}")
        found = json.loads(said)
        self.model, self.address, self.process = found["model"], found["url"].split("/")[2], process.pid

    def ask(self, prompt: str, new: int) -> Reply:
        """Send one request for this many tokens, greedy, and wait for all of them."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        connection = http.client.HTTPConnection(self.address, timeout=_SECONDS)
        try:
            asked = time.perf_counter()
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            return _read(connection.getresponse(), asked)
        finally:
            connection.close()

    def ask_all(self, prompts: Sequence[str], new: int, most: int | None = None) -> list[Reply]:
        """Send a request for each prompt, at most so many at a time, by default all."""
        with ThreadPoolExecutor(most or len(prompts)) as clients:
            return list(clients.map(self.ask, prompts, itertools.repeat(new)))


def _read(response: http.client.HTTPResponse, asked: float) -> Reply:
    if response.status != 200:
        raise RuntimeError(f"klfast serve replied {response.status}: {response.read().decode()}")
    text, arrived, cached = "", [], 0
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            for choice in event["choices"]:
                arrived.append(time.perf_counter())
                text += choice["text"]
            if usage := event.get("usage"):
                cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Reply(text, asked, arrived, cached)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.communicate()


@functools.lru_cache(maxsize=1)
def folder(name: str) -> Path:
    """Return a folder with the model of this name in INT4 (groups of 64), whose tokens are words."""
    model = models.ours(name, (QuantSpec(4, 64),), "exact")
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # every answer has its whole length
    made = Path(tempfile.mkdtemp(prefix="klfast-serve-"))
    atexit.register(shutil.rmtree, made)
    klfast.save_quantized(model, made / name, _words(model.config.vocab_size))
    return made / name


def _words(size: int) -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def prompt(chance: random.Random, tokens: int) -> str:
    """Return a text of this many tokens."""
    return " ".join(f"w{chance.randrange(512)}" for _ in range(tokens))
