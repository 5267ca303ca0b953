"""The rows of a tied head: the weight of each one's use as an embedding, against float64 and against measured KL."""

import copy

import pytest
import torch
from tiny_models import VOCABULARY, batch, in_float64, tiny

from klfast.models.families.base import LogitRule
from klfast.models.head import Readout
from klfast.rounding.head_rows import ridges, spreads

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_ridges_against_float64(scale):
    weight, hidden = torch.randn(30, 16), [torch.randn(2, 9, 16), torch.randn(1, 7, 16)]
    ids = [torch.randint(0, 25, (2, 9)), torch.randint(0, 25, (1, 7))]
    found = ridges(spreads(Readout(weight, rule=LogitRule(scale)), hidden), ids, 0.7)
    states = torch.cat([each.flatten(0, 1) for each in hidden]).double()
    p = (scale * states @ weight.double().T).softmax(-1)
    counts = torch.zeros(30, dtype=torch.float64)
    for token in torch.cat([each.flatten() for each in ids]).tolist():
        counts[token] += 1
    frequency = (counts + 0.5) / (25 + 15)
    truth = 2 * 0.7 * frequency / (scale**2 * (p * (1 - p)).mean(0))
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=0)


@torch.no_grad()
def test_the_ridge_weighs_both_uses_by_what_they_cost():
    """Errors of equal size in one row, in the head alone and in the embedding alone, cost as their ratio predicts."""
    model, ids = tiny("llama", tied=False), batch(64, 16)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    teacher = in_float64(model)
    log_p = teacher(ids).logits.log_softmax(-1)
    error = 0.02 * torch.randn(VOCABULARY, 64, dtype=torch.float64)

    def cost(change):
        student = copy.deepcopy(teacher)
        change(student)
        return (log_p.exp() * (log_p - student(ids).logits.log_softmax(-1))).sum(-1).mean().item()

    embedded = cost(lambda student: student.model.embed_tokens.weight.add_(error))
    headed = cost(lambda student: student.lm_head.weight.add_(error))
    hidden = model.model(ids)[0]
    k = embedded / error[ids].square().sum(-1).mean().item()
    states = hidden.flatten(0, 1).double()
    ridge = ridges(spreads(Readout(model.lm_head.weight), [hidden]), [ids], k).double()
    hessian = states.T @ states / len(states)
    share = (ridge * error.square().sum(1) * _spread(states, model)).sum() / 2
    other = (torch.einsum("vk,kl,vl->v", error, hessian, error) * _spread(states, model)).sum() / 2
    assert share.item() == pytest.approx(embedded, rel=0.1)
    assert other.item() == pytest.approx(headed, rel=0.5)


def _spread(states, model):
    p = (states @ model.lm_head.weight.double().T).softmax(-1)
    return (p * (1 - p)).mean(0)
