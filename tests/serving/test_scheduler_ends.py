"""The scheduler's bounds and ends: a full queue, a shutdown, answers and engines that fail."""

from collections import Counter

import pytest
import served
import torch
from asked import WAIT, Asked, prompts, until

from klfast.core.errors import InvalidInputError
from klfast.generation.engine import lower
from klfast.serving.errors import ClosedError, QueueFullError


class Damaging:
    """An engine whose next logits after ``good`` calls are NaN."""

    def __init__(self, good):
        self._engine, self._good = lower(served.model(), 64), good
        self.state = self._engine.state

    def __call__(self, ids, state):
        self._good -= 1
        logits = self._engine(ids, state)
        return logits.fill_(float("nan")) if self._good == -1 else logits


def counted(scheduler, name):
    """Return a metric's value."""
    lines = scheduler._metrics.text().decode().splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} ")), 0)


def test_the_queue_is_bounded(start):
    scheduler = start(sequences=2, waiting=3)
    asked = [Asked([5, 6, 7], 30, pause=0.01) for _ in range(2)]
    scheduler.submit([one.answer for one in asked])
    assert until(lambda: all(one.pieces for one in asked))
    more = [Asked([8], 3) for _ in range(3)]
    scheduler.submit([one.answer for one in more])
    with pytest.raises(QueueFullError, match=r"^1 more .* too many; there is room for 0 now, try again later$"):
        scheduler.submit([Asked([8], 3).answer])
    assert len({tuple(one.made) for one in more}) == 1


def test_free_places_count_as_room(start):
    scheduler = start(sequences=2, waiting=3)
    with pytest.raises(InvalidInputError, match=r"^6 answers .* are more than the 5 that this server takes at once$"):
        scheduler.submit([Asked([8], 3).answer for _ in range(6)])
    for _ in range(2):
        asked = [Asked([8], 3) for _ in range(5)]
        scheduler.submit([one.answer for one in asked])
        assert len({tuple(one.made) for one in asked}) == 1
        assert until(lambda: scheduler._free == 2)
    running = Asked([5], 1000, pause=0.01)
    scheduler.submit([running.answer])
    assert until(lambda: running.pieces and scheduler._free == 1)
    with pytest.raises(QueueFullError, match="there is room for 4 now"):
        scheduler.submit([Asked([8], 3).answer for _ in range(5)])  # all or none
    more = [Asked([8], 3) for _ in range(4)]
    scheduler.submit([one.answer for one in more])
    assert all(one.done.wait(WAIT) for one in more)
    running.answer.is_cancelled = True


def test_closing_finishes_what_was_accepted(start):
    scheduler = start(sequences=3)
    asked = [Asked(text, 15) for text in prompts(9)]
    scheduler.submit([one.answer for one in asked])
    scheduler.close()
    assert not scheduler.is_alive and all(one.done.is_set() for one in asked)
    assert Counter(one.finish for one in asked) == {"length": 9}
    with pytest.raises(ClosedError, match="shutting down"):
        scheduler.submit([Asked([5], 3).answer])


def test_closing_at_once(start):
    scheduler = start()
    asked = Asked([5], 5000, pause=0.001)
    scheduler.submit([asked.answer])
    assert until(lambda: asked.pieces)
    scheduler.close(finish=False)
    assert not scheduler.is_alive and not asked.done.is_set()


def test_damaged_numbers_end_one_answer_only(start):
    import copy

    model = copy.deepcopy(served.model())
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = float("nan")
    scheduler = start(model)
    bad, good = Asked([5, 77, 6], 9), Asked([5, 6], 9)
    scheduler.submit([bad.answer, good.answer])
    assert bad.text == "" and bad.finish == "error" and "NaN" in bad.pieces[-1].error
    assert good.made == served.alone(good.prompt, 9, eos_token_id=[])
    scheduler.close()
    assert counted(scheduler, "klfast_answer_tokens_total") == 9 and bad.answer.made == 0
    assert counted(scheduler, 'klfast_answers_total{end="failed"}') == 1
    assert counted(scheduler, 'klfast_answers_total{end="finished"}') == 1
    assert counted(scheduler, "klfast_first_token_seconds_count") == 1


def test_a_failed_answer_leaves_no_state(start):
    """Its last step added no token, so that its tokens but the last are not those of its state."""
    scheduler = start(engine=Damaging(good=4))
    bad = Asked([5, 6, 7], 9)
    scheduler.submit([bad.answer])
    assert len(bad.made) == 4 and bad.finish == "error"
    text = bad.prompt + bad.made
    for prompt in (text[:-1], [*text[:-1], 9], text):
        later = Asked(prompt, 6)
        scheduler.submit([later.answer])
        assert later.made == served.alone(prompt, 6, eos_token_id=[]) and later.finish == "length"
    scheduler.close()
    assert counted(scheduler, "klfast_answer_tokens_total") == 4 + 3 * 6
    assert counted(scheduler, 'klfast_answers_total{end="failed"}') == 1


def test_an_engine_that_fails_ends_answers_not_the_server(start):
    scheduler = start()
    bad, good = Asked([5, 10**6], 9), Asked([5, 6], 9)  # a token beyond the vocabulary
    scheduler.submit([bad.answer, good.answer])
    assert bad.text == "" and bad.finish == "error" and "token ids must lie in 0..419" in bad.pieces[-1].error
    assert good.made == served.alone(good.prompt, 9, eos_token_id=[])
