"""Presence and frequency penalties against counting by hand, without a cache."""

from collections import Counter

import pytest
import torch
from tiny_models import batch, left_padded, tiny

import klfast
from klfast.core import errors

pytestmark = pytest.mark.usefixtures("one_thread")
PENALTIES = [(1.5, 0.0), (0.0, 0.7), (-0.5, 1.0), (2.0, 2.0)]


@torch.no_grad()
def by_hand(model, prompt, new, presence, frequency):
    """Return the most likely tokens after a prompt when each one counts that was written, but none of the prompt."""
    made = []
    for _ in range(new):
        logits = model(torch.tensor([prompt + made]), use_cache=False).logits[0, -1].double()
        for token, times in Counter(made).items():
            logits[token] -= presence + frequency * times
        made.append(int(logits.argmax()))
    return made


@pytest.mark.parametrize(("presence", "frequency"), PENALTIES)
def test_count_what_was_written(presence, frequency):
    model, ids = tiny("llama"), batch(3, 9)
    penalties = dict(presence_penalty=presence, frequency_penalty=frequency)
    found = klfast.generate(model, ids, 20, **penalties)[:, 9:].tolist()
    assert found == [by_hand(model, row, 20, presence, frequency) for row in ids.tolist()]
    assert found != klfast.generate(model, ids, 20)[:, 9:].tolist()
    padded = klfast.generate(model, ids, 20, attention_mask=left_padded(ids), **penalties)[:, 9:].tolist()
    assert padded[0] == by_hand(model, ids[0, 4:].tolist(), 20, presence, frequency)


def test_change_what_is_sampled():
    model, ids = tiny("llama"), batch(1, 2).expand(2000, -1)
    first = klfast.generate(model, ids, 1)[:, -1:]

    def repeats(**penalties):
        made = klfast.generate(model, ids, 30, temperature=1.0, generator=torch.Generator().manual_seed(1), **penalties)
        return sum(len(set(row)) for row in made[:, 2:].tolist()) / len(made)

    assert first.numel() == 2000
    assert repeats(frequency_penalty=-1) < repeats() < repeats(frequency_penalty=2)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [2.1, -3, float("nan"), "1", True])
def test_out_of_range(name, value):
    with pytest.raises(errors.InvalidInputError, match=f"^{name} must be between -2 and 2"):
        klfast.generate(tiny("llama"), batch(), 2, **{name: value})
