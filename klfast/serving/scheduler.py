"""``Scheduler``: the thread that runs the engine for all answers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from klfast.core.errors import InvalidInputError
from klfast.engine.engine import Engine
from klfast.engine.program import MOST_SEQUENCES
from klfast.generation.engine import ROWS
from klfast.serving.answer import Answer
from klfast.serving.batch import Batch
from klfast.serving.errors import ClosedError, QueueFullError
from klfast.serving.metrics import Metrics
from klfast.serving.prefill import Prefill
from klfast.serving.prefix_cache import PrefixCache
from klfast.serving.shares import Shares

_BESIDE = 128  # tokens of a prompt between two tokens of running answers, which wait for it


class Scheduler:
    """Writes answers, several at a time. Clients share the places equally, and a client's requests those of the client.

    A thread of its own alone touches the engine. It takes turns: one chunk of a prompt, then one token of each running
    answer, so that prompts delay no answer by more than a chunk. Prompts take turns, too, so that a short one does not
    wait for a long one; of those that begin alike, one goes ahead, and the others go on from what it left in the cache.

    A free place goes to the client that has fewest, among its requests to the one that has fewest, of several to the
    one that has waited longest. Where none is free and a client has two more than one that waits, or a request two more
    than another one of its client, it gives one up: that answer is parked with its state, until a place is free again.

    Args:
        engine: of the model.
        cache: states of earlier texts.
        metrics: counts what happens.
        sequences: most answers at a time.
        waiting: most answers in the queue, beside those that have a place.
        chunk: most tokens of a prompt at a time, while no answer is running.
    """

    def __init__(
        self,
        engine: Engine,
        cache: PrefixCache,
        metrics: Metrics,
        *,
        sequences: int = MOST_SEQUENCES,
        waiting: int = 256,
        chunk: int = ROWS,
    ) -> None:
        self._engine, self._cache, self._metrics = engine, cache, metrics
        self._chunk, self._beside = chunk, min(chunk, _BESIDE)
        self._start, self._batch, self._most_waiting = engine.state(), Batch(engine, sequences), waiting
        self._waiting: deque[Answer] = deque()
        self._prefills: deque[Prefill] = deque()  # in the order of their turns
        self._parked: dict[Answer, Callable[[], None]] = {}  # and what lets each go on
        self._most_parked, self._requests = 2 * sequences, 0
        self._free = sequences  # places that neither running nor parked answers need
        self._changed = threading.Condition()
        self._is_open = self._finishes = True
        self._thread = threading.Thread(target=self._run, name="klfast scheduler")
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether answers are still written."""
        return self._thread.is_alive()

    def submit(self, answers: Sequence[Answer], client: str = "") -> None:
        """Queue the answers of a client's request, all or none.

        Raises:
            InvalidInputError: there are more than places and queue take together.
            QueueFullError: too many are waiting.
            ClosedError: ``close`` was called.
        """
        most = self._batch.most + self._most_waiting
        if len(answers) > most:
            raise InvalidInputError(
                f"{len(answers)} answers (n times the prompts) are more than the {most} that this server takes at once"
            )
        with self._changed:
            if not self._is_open:
                raise ClosedError("the server is shutting down")
            room = self._most_waiting + max(0, self._free) - len(self._waiting)
            if len(answers) > room:
                raise QueueFullError(
                    f"{len(answers)} more answers are too many; there is room for {max(0, room)} now, try again later"
                )
            self._requests += 1
            for answer in answers:
                answer.client, answer.request = client, self._requests
            self._waiting.extend(answers)
            self._changed.notify()

    def close(self, *, finish: bool = True) -> None:
        """Take no more answers, write those that were accepted (or, without ``finish``, none), and end the thread."""
        with self._changed:
            self._is_open, self._finishes = False, finish
            self._changed.notify()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while self._wait():
            self._drop_cancelled()
            self._admit()
            self._feed()
            self._decode()

    def _wait(self) -> bool:
        """Wait for work; return False if there will be none."""
        with self._changed:
            self._metrics.waiting.set(len(self._waiting) + len(self._parked))
            running = len(self._batch) + len(self._prefills)
            self._metrics.running.set(running)
            self._free = self._batch.most - running - len(self._parked)
            self._metrics.cache_bytes.set(self._cache.nbytes)
            self._changed.wait_for(lambda: self._has_work or not self._is_open)
            return self._finishes and self._has_work

    @property
    def _has_work(self) -> bool:
        return bool(self._waiting or self._parked or self._prefills or self._batch)

    def _drop_cancelled(self) -> None:
        with self._changed:
            kept = deque(answer for answer in self._waiting if not answer.is_cancelled)
            dropped, self._waiting = len(self._waiting) - len(kept), kept
        fed = deque(prefill for prefill in self._prefills if not prefill.answer.is_cancelled)
        dropped, self._prefills = dropped + len(self._prefills) - len(fed), fed
        parked = {answer: go_on for answer, go_on in self._parked.items() if not answer.is_cancelled}
        dropped, self._parked = dropped + len(self._parked) - len(parked), parked
        for row in reversed(range(len(self._batch))):
            if self._batch.answers[row].is_cancelled:
                self._batch.remove(row)
                dropped += 1
        self._metrics.answers.labels("cancelled").inc(dropped)

    def _admit(self) -> None:
        """Give places to those who have fewest: the free ones, then those that others have too many of."""
        while self._waiting or self._parked:
            running = [*(prefill.answer for prefill in self._prefills), *self._batch.answers]
            shares = Shares(running)
            with self._changed:
                wanting = [*self._parked, *self._waiting]
            if len(running) < self._batch.most:
                answer = shares.next(wanting)
            elif len(self._parked) < self._most_parked and (exchange := shares.exchange(wanting)):
                answer, giver = exchange
                if not self._park(giver):
                    return
            else:
                return
            if answer in self._parked:
                self._go_on(answer)
            else:
                self._prefills.append(Prefill(self._engine, self._start, answer, self._cache))
                with self._changed:
                    self._waiting.remove(answer)
                    self._free -= 1

    def _park(self, request: int) -> bool:
        """Take a place from a request; return False if its answer cannot be set aside."""
        if fed := [prefill for prefill in self._prefills if prefill.answer.request == request]:
            prefill = min(fed, key=lambda one: one.fed)
            self._prefills.remove(prefill)
            self._parked[prefill.answer] = lambda: self._prefills.append(prefill)  # another deque by then
        else:
            row = max(row for row, answer in enumerate(self._batch.answers) if answer.request == request)
            answer = self._batch.answers[row]
            try:
                self._parked[answer] = partial(self._batch.add, answer, self._batch.take(row))
            except Exception:  # noqa: BLE001 (no memory for a copy, say: then it keeps its place)
                return False
        return True

    def _go_on(self, answer: Answer) -> None:
        """Put a parked answer back."""
        go_on = self._parked.pop(answer)
        try:
            go_on()
        except Exception as error:  # noqa: BLE001 (as in ``_feed``)
            self._fail([answer], error)

    def _feed(self) -> None:
        """Feed one chunk of the prompt whose turn it is; after its last one the answer joins the batch."""
        if not self._prefills:
            return
        prefill = next(one for one in self._prefills if not any(other.leads(one) for other in self._prefills))
        self._prefills.remove(prefill)
        answer = prefill.answer
        try:
            self._metrics.prompt_tokens.inc(prefill.step(self._beside if self._batch else self._chunk))
            if prefill.logits is None:
                self._prefills.append(prefill)
                return
            self._metrics.cached_tokens.inc(answer.cached_tokens)
            waited = time.monotonic() - answer.asked
            self._take(answer, prefill.logits)
            if answer.made:
                self._metrics.first_token.observe(waited)
            if not answer.is_done:
                self._batch.add(answer, prefill.state)
        except Exception as error:  # noqa: BLE001 (memory, say: this answer's end, not the server's)
            self._fail([answer], error)

    def _decode(self) -> None:
        """Write one token of each running answer."""
        if not self._batch:
            return
        begun = time.monotonic()
        try:
            logits = self._batch.step()
            for row in reversed(range(len(self._batch))):  # a row that leaves is replaced by one that was here
                answer, own = self._batch.answers[row], logits[row : row + 1]
                self._take(answer, own)
                if answer.is_done:
                    if not answer.has_failed:  # which has no last token: the key would be one too short
                        self._cache.put(answer.tokens[:-1], self._batch.state, row, own)
                    self._batch.remove(row)
        except Exception as error:  # noqa: BLE001 (as above; what the step left is unknown)
            self._fail(self._batch.answers, error)
            while self._batch:
                self._batch.remove(len(self._batch) - 1)
        self._metrics.step.observe(time.monotonic() - begun)

    def _take(self, answer: Answer, logits: torch.Tensor) -> None:
        answer.take(logits)
        if not answer.has_failed:
            self._metrics.answer_tokens.inc()
        if answer.is_done:
            self._metrics.answers.labels("failed" if answer.has_failed else "finished").inc()

    def _fail(self, answers: Sequence[Answer], error: Exception) -> None:
        for answer in answers:
            if not answer.is_done:
                answer.fail(error)
                self._metrics.answers.labels("failed").inc()
