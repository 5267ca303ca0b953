"""Answers that a scheduler is asked for, and what was delivered of them."""

import random
import threading
import time

import served

from klfast.generation.penalties import Penalties
from klfast.generation.settings import Settings
from klfast.serving.answer import Answer

WAIT = 20  # seconds


class Asked:
    """An answer and what was delivered of it."""

    def __init__(self, prompt, new, *, ends=(), strings=(), sampling=None, pause=0.0, **options):
        self.prompt, self.new, self.pieces, self.done = prompt, new, [], threading.Event()
        self.pause = pause
        settings = Settings(new, sampling, Penalties(), list(ends), list(strings), None)
        self.answer = Answer(prompt, settings, served.words(), deliver=self.take, **options)

    def take(self, piece):
        time.sleep(self.pause)
        self.pieces.append(piece)
        if piece.finish:
            self.done.set()

    @property
    def text(self):
        assert self.done.wait(WAIT)
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self):
        return self.pieces[-1].finish

    @property
    def made(self):
        assert self.done.wait(WAIT)
        return self.answer.tokens[len(self.prompt) :]


def prompts(count, seed=0, longest=90):
    """Return prompts of random tokens."""
    chance = random.Random(seed)
    return [[chance.randrange(3, 400) for _ in range(chance.randint(1, longest))] for _ in range(count)]


def until(holds):
    """Wait until a function returns something true; return that, or what it returned at last."""
    end = time.monotonic() + WAIT
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.001)
    return found  # as it was: it may hold for a moment only
