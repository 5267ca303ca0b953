"""The state of answers that go through the engine together."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import batch, tiny

from klfast.generation.engine import lower
from klfast.serving.batch import Batch


class Memory:
    """Stands for torch.zeros: memory ends after some tensors."""

    def __init__(self, tensors):
        self.left, self.zeros = tensors, torch.zeros

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise MemoryError
        return self.zeros(*args, **kwargs)


@torch.inference_mode()
@pytest.mark.parametrize("grown", [0, 1])  # tensors of the state before memory ends
def test_goes_on_after_an_allocation_failed(grown, monkeypatch):
    ids, engine = batch(1, 264), lower(tiny("llama"))
    answers, alone = Batch(engine, 2), engine.state()
    engine(ids[:, :250], alone)
    answer = SimpleNamespace(last_token=0)
    answers.add(answer, alone.copy())
    for t in range(250, 264):
        answer.last_token = int(ids[0, t])
        if t == 256:  # there is room for so many tokens
            with monkeypatch.context() as patch:
                patch.setattr(torch, "zeros", Memory(grown))
                with pytest.raises(MemoryError):
                    answers.step()
        assert torch.equal(answers.step(), engine(ids[:, t : t + 1], alone)), t
    assert answers.state.seen.tolist() == [264, 0]
    rows = zip(answers.state.since(0, 0), alone.since(0, 0), strict=True)
    assert all(torch.equal(found, expected) for found, expected in rows)
