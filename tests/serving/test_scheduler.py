"""The scheduler: answers written together equal those written alone."""

from functools import partial
from itertools import pairwise

import pytest
import served
import torch
from asked import WAIT, Asked, prompts, until
from tiny_models import tiny

from klfast.generation.engine import lower
from klfast.generation.sampling import Sampling
from klfast.serving.prefill import Prefill
from klfast.serving.prefix_cache import PrefixCache


class Recorded:
    """An engine that notes the numbers of sequences and tokens of each call."""

    def __init__(self):
        self._engine, self.calls = lower(served.model(), 64), []
        self.state = self._engine.state

    def __call__(self, ids, state):
        self.calls.append(tuple(ids.shape))
        return self._engine(ids, state)

    @property
    def chunks(self):
        """The tokens of each call that is not for a single one."""
        return [tokens for _, tokens in self.calls if tokens > 1]


@pytest.mark.parametrize("cache_bytes", [0, 10**8])
def test_answers_equal_those_written_alone(start, cache_bytes):
    scheduler = start(cache_bytes=cache_bytes, chunk=13)
    texts = prompts(40)
    texts += [text[: len(text) // 2 + 1] for text in texts[:10]] + texts[:4]  # beginnings and repetitions of others
    asked = [Asked(text, 1 + i % 23) for i, text in enumerate(texts)]
    for one in asked:
        scheduler.submit([one.answer])
    for one in asked:
        assert one.made == served.alone(one.prompt, one.new, eos_token_id=[])
        assert one.text == served.text_after(one.prompt, one.made) and one.finish == "length"
        assert [piece.finish for piece in one.pieces[:-1]] == [None] * (one.new - 1)


@pytest.mark.parametrize("family", ["hymba", "qwen3_5", "falcon_mamba"])
def test_every_kind_of_state(start, family):
    model = tiny(family, vocabulary=len(served.words()))
    scheduler = start(model, chunk=13)
    asked = [Asked(text, 3 + i) for i, text in enumerate(prompts(20))]
    scheduler.submit([one.answer for one in asked])
    again = [Asked([*one.prompt, *one.made, 5], 4) for one in asked]
    scheduler.submit([one.answer for one in again])
    for one in [*asked, *again]:
        assert one.made == served.alone(one.prompt, one.new, model, eos_token_id=[])


@pytest.mark.parametrize(
    ("tokens", "shared", "most", "chunks"),
    [
        (14, 0, 13, [7, 7]),
        (40, 0, 13, [10, 10, 10, 10]),
        (27, 13, 13, [13, 7, 7]),
        (14, 13, 64, [14]),  # what is shared is not kept: one token would follow it
        (14, 1, 64, [14]),  # or be it
        (513, 511, 64, [64] * 7 + [63, 2]),  # nor are 512 tokens
        (1, 0, 13, [1]),
    ],
)
def test_no_chunk_but_a_whole_prompt_is_a_single_token(tokens, shared, most, chunks):
    engine, cache = Recorded(), PrefixCache(10**8)
    asked = Asked([3 + i % 400 for i in range(tokens)], 1, shared=shared)
    prefill = Prefill(engine, engine.state(), asked.answer, cache)
    while prefill.logits is None:
        prefill.step(most)
    assert [length for _, length in engine.calls] == chunks


def test_states_that_outgrow_their_room(start):
    scheduler = start(cache_bytes=0)
    asked = [Asked([5 + i] * (1 + 90 * i), 300 + 150 * i) for i in range(4)]  # the room is 256 tokens, 512, 1,024
    scheduler.submit([one.answer for one in asked])
    for one in asked:
        assert one.made == served.alone(one.prompt, one.new, eos_token_id=[])


def test_end_tokens_and_stop_strings(start):
    scheduler = start()
    prompt = prompts(1)[0]
    made = served.alone(prompt, 30, eos_token_id=[])
    end = next(t for t in made[4:] if t not in made[:4])
    whole = served.text_after(prompt, made)
    stop = whole[9:12]
    by_token, by_text = Asked(prompt, 30, ends=[end]), Asked(prompt, 30, strings=["never said", stop])
    scheduler.submit([by_token.answer, by_text.answer])
    cut = made.index(end)
    assert by_token.made == made[: cut + 1] and by_token.finish == "stop"
    assert by_token.text == served.text_after(prompt, made[:cut])
    assert by_text.text == whole[: whole.index(stop)] and by_text.finish == "stop"
    assert by_text.answer.made < 30


def test_a_seed_decides_whatever_runs_beside(start):
    scheduler, sampling = start(), Sampling(1.0, top_k=40)
    [prompt] = prompts(1)

    def sampled(seed):
        return Asked(prompt, 20, sampling=sampling, seed=seed)

    first = sampled(7)
    scheduler.submit([first.answer])
    expected = first.made
    crowd = [Asked(text, 30) for text in prompts(9, seed=3)]
    again, other = sampled(7), sampled(8)
    scheduler.submit(
        [*(one.answer for one in crowd[:5]), again.answer, other.answer, *(one.answer for one in crowd[5:])]
    )
    assert again.made == expected != other.made
    generator = torch.Generator().manual_seed(7)
    assert expected == served.alone(prompt, 20, temperature=1.0, top_k=40, generator=generator, eos_token_id=[])


def test_scores_are_the_model_s(start):
    scheduler = start()
    [prompt] = prompts(1)
    asked = Asked(prompt, 6, top_logprobs=3)
    scheduler.submit([asked.answer])
    made = asked.made
    with torch.inference_mode():
        truth = served.model()(torch.tensor([prompt + made[:-1]])).logits[0, len(prompt) - 1 :].double().log_softmax(-1)
    for piece, token, row in zip(asked.pieces, made, truth, strict=True):
        best = row.topk(3)
        assert piece.scores.token == token and piece.scores.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [t for t, _ in piece.scores.top] == best.indices.tolist()
        assert [p for _, p in piece.scores.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_the_next_turn_feeds_only_what_is_new(start):
    scheduler = start()
    first = Asked(prompts(1, longest=1)[0] * 50, 12)
    scheduler.submit([first.answer])
    text = first.prompt + first.made
    second, repeated = Asked([*text, 5, 6, 7], 8), Asked(first.prompt, 12)
    scheduler.submit([second.answer, repeated.answer])
    assert second.made == served.alone(second.prompt, 8, eos_token_id=[])
    assert second.answer.cached_tokens == len(text) - 1  # the last token was not fed
    assert repeated.made == first.made and repeated.answer.cached_tokens == len(first.prompt)


def test_a_long_prompt_does_not_hold_up_running_answers(start):
    scheduler = start(chunk=8)
    running, order = Asked([5, 6], 60), []
    long = Asked(prompts(1)[0][:1] * 400, 2)
    _note(running, order, "running")
    _note(long, order, "long")
    scheduler.submit([running.answer, long.answer])
    assert running.done.wait(WAIT) and long.done.wait(WAIT)
    assert order.index("long") > 45  # one token between each two of the 50 chunks


def test_prompts_are_fed_in_small_chunks_between_tokens_and_in_large_ones_alone(start):
    engine = Recorded()
    scheduler = start(engine=engine, chunk=512)
    alone = Asked([5] * 600, 1)
    scheduler.submit([alone.answer])
    assert alone.done.wait(WAIT) and engine.chunks == [512, 88]
    engine.calls.clear()
    asked = [Asked([5, 6], 60), *(Asked([7 + i] * 384, 60) for i in range(4))]
    scheduler.submit([one.answer for one in asked])
    assert all(one.done.wait(WAIT) for one in asked)
    assert engine.chunks == [2] + 12 * [128]
    assert not any(a > 1 and b > 1 for (_, a), (_, b) in pairwise(engine.calls))


def test_a_long_prompt_does_not_hold_up_short_ones(start):
    engine, order, fed = Recorded(), [], []
    scheduler = start(engine=engine, chunk=8)
    long, short = Asked([5] * 400, 1), [Asked([6 + i] * 24, 1) for i in range(10)]
    for one in (long, *short):
        _note(one, order, one, lambda: fed.append(len(engine.chunks)))
    scheduler.submit([one.answer for one in (long, *short)])
    assert all(one.done.wait(WAIT) for one in (long, *short))
    assert order == [*short, long]
    assert fed == [*range(24, 34), 80]  # chunks: the short prompts end with their third, of 11 in turn


def test_short_prompts_do_not_starve_a_long_one(start):
    scheduler, ended = start(chunk=8, cache_bytes=0), []

    def ask():
        short = Asked([6 + len(ended) % 300] * 16, 1)
        _note(short, ended, short, lambda: long.done.is_set() or len(ended) > 500 or ask())
        scheduler.submit([short.answer])

    long, before = Asked([5] * 400, 1), []
    _note(long, before, long, lambda: before.append(len(ended)))
    scheduler.submit([long.answer])
    for _ in range(3):
        ask()
    assert long.done.wait(WAIT)
    assert 30 < before[1] < 90  # of four turns one is the long prompt's, and two make a short one


def test_prompts_that_begin_alike_are_fed_once(start):
    engine = Recorded()
    scheduler = start(engine=engine, chunk=16)
    begin = list(range(5, 105))
    ends = [[20 + i] * 10 for i in range(6)]
    asked = [Asked(begin + end, 5, shared=len(begin)) for end in [*ends, ends[0], ends[0]]]
    scheduler.submit([one.answer for one in asked])
    for one in asked:
        assert one.made == served.alone(one.prompt, 5, eos_token_id=[])
    assert sum(engine.chunks) == 100 + 6 * 10
    assert [one.answer.cached_tokens for one in asked] == [0] + 5 * [100] + 2 * [110]


def test_a_long_beginning_is_found_without_a_hint(start):
    scheduler = start()
    for end, cached in ([6], 0), ([7], 1024), ([8], 1024):
        asked = Asked([5] * 1100 + end * 9, 3)
        scheduler.submit([asked.answer])
        assert asked.made == served.alone(asked.prompt, 3, eos_token_id=[])
        assert asked.answer.cached_tokens == cached


def _note(asked, order, name, then=lambda: None):
    """Append a name to a list with each piece that is delivered."""
    take = asked.answer._deliver
    asked.answer._deliver = lambda piece: (order.append(name), then(), take(piece))


def test_cancelled_answers_leave_the_others_alone(start):
    scheduler = start()
    asked = [Asked(text, 40, pause=0.001) for text in prompts(30)]
    scheduler.submit([one.answer for one in asked])
    assert until(lambda: len(asked[0].pieces) > 3)
    for one in asked[::3]:
        one.answer.is_cancelled = True
    for i, one in enumerate(asked):
        if i % 3:
            assert one.made == served.alone(one.prompt, 40, eos_token_id=[])
    assert sum(one.done.is_set() for one in asked[::3]) == 0
    assert max(len(one.pieces) for one in asked[::3]) < 40


def test_nothing_more_is_done_for_cancelled_answers(start):
    scheduler = start(sequences=1, waiting=2, chunk=1)
    long, waiting = Asked([5] * 10**5, 1), [Asked([6], 1) for _ in range(2)]
    scheduler.submit([long.answer])
    assert until(lambda: not scheduler._waiting)  # it has begun
    scheduler.submit([one.answer for one in waiting])
    for one in waiting:
        one.answer.is_cancelled = True
    assert until(lambda: not scheduler._waiting)  # they make room at once, though none could begin
    last = Asked([7], 3)
    scheduler.submit([last.answer])
    long.answer.is_cancelled = True
    assert last.made == served.alone([7], 3, eos_token_id=[])
    assert not any(one.done.is_set() for one in [long, *waiting])


@pytest.mark.parametrize("family", ["granite_hybrid", "hymba"])
def test_a_request_gives_up_places_beyond_its_share(start, family):
    """The answers that lose their places go on later as if nothing had been."""
    model = tiny(family, vocabulary=len(served.words()))
    scheduler, parked, ended = start(model, sequences=4, chunk=13), [], []
    many, few, one = ([Asked(text, new) for text in prompts(count, count)] for count, new in [(8, 90), (2, 20), (1, 9)])
    everything = [*many, *few, *one]

    def look(asked):
        parked.append(len(scheduler._parked))
        if asked is many[0] and len(asked.pieces) == 5:
            scheduler.submit([asked.answer for asked in few])
            scheduler.submit([asked.answer for asked in one])
        if asked.answer.made == asked.new:
            ended.append(asked)

    for asked in everything:
        _note(asked, [], None, partial(look, asked))
    scheduler.submit([asked.answer for asked in many])
    for asked in everything:
        assert asked.made == served.alone(asked.prompt, asked.new, model, eos_token_id=[])
    assert max(parked) == 2  # four places were divided in 2, 1, 1
    assert ended[:3] == [*one, *few]


def test_parked_answers_are_few(start):
    """Each has its state, so that a crowd of requests with many answers could fill the memory."""
    scheduler, parked = start(sequences=8), []
    requests = [[Asked(text, 40) for text in prompts(8, seed)] for seed in range(5)]

    def submit(number):
        if number < len(requests):
            asked = requests[number]
            _note(asked[0], [], None, lambda: asked[0].pieces or submit(number + 1))
            _note(asked[0], [], None, lambda: parked.append(len(scheduler._parked)))
            scheduler.submit([one.answer for one in asked])

    submit(0)
    for request in requests:
        for asked in request:
            assert asked.done.wait(WAIT) and asked.finish == "length"
    assert 8 < max(parked) <= 16  # else requests that come after many answers have no place
