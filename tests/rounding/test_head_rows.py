"""The rows of a tied head: the weight of each one's use as an embedding, against float64 and against measured KL."""

import copy

import pytest
import torch
from tiny_models import VOCABULARY, batch, in_float64, tiny

from klfast.models.families.base import LogitRule
from klfast.models.head import Readout
from klfast.rounding.head_rows import clusters, ridges
from klfast.rounding.moments import Moments

pytestmark = pytest.mark.usefixtures("one_thread")


def spread_of(readout, hidden):
    moments = Moments(hidden[0].shape[-1], hidden[0].device)
    for each in hidden:
        moments.add(each, each)
    return clusters(readout, hidden, hidden, moments).spread


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_ridges_against_float64(scale):
    weight, hidden = torch.randn(30, 16), [torch.randn(2, 9, 16), torch.randn(1, 7, 16)]
    ids = [torch.randint(0, 25, (2, 9)), torch.randint(0, 25, (1, 7))]
    found = ridges(spread_of(Readout(weight, rule=LogitRule(scale)), hidden), ids, 0.7)
    states = torch.cat([each.flatten(0, 1) for each in hidden]).double()
    p = (scale * states @ weight.double().T).softmax(-1)
    counts = torch.zeros(30, dtype=torch.float64)
    for token in torch.cat([each.flatten() for each in ids]).tolist():
        counts[token] += 1
    frequency = (counts + 0.5) / (25 + 15)
    truth = 2 * 0.7 * frequency / (scale**2 * (p * (1 - p)).mean(0))
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=0)


def test_a_clusters_hessian_weighs_states_by_its_rows_tokens():
    weight = torch.randn(90, 12)
    student, teacher = ([torch.randn(2, 40, 12), torch.randn(1, 30, 12)] for _ in range(2))
    y, x = (torch.cat([each.flatten(0, 1) for each in hidden]).double() for hidden in (student, teacher))
    moments = Moments(12, weight.device)
    moments.add(y, x)
    found = clusters(Readout(weight, rule=LogitRule(0.5)), student, teacher, moments)
    assert len(found.hessian) == 16 and set(found.of_row.tolist()) == set(range(16))
    p = (0.5 * x @ weight.double().T).softmax(-1)
    for each in range(16):
        w = (p * (1 - p))[:, found.of_row == each].sum(1, keepdim=True)
        own, own_cross = y.T @ (w * y) / w.sum(), y.T @ (w * x) / w.sum()
        size = own.trace() / (y.T @ y / len(y)).trace()
        for one, of_own, of_all in ((found.hessian, own, y.T @ y), (found.cross, own_cross, y.T @ x)):
            truth = 0.95 * of_own + 0.05 * size * of_all / len(y)
            torch.testing.assert_close(one[each].double(), truth, rtol=1e-4, atol=1e-5)


def test_equal_rows_share_a_cluster_and_near_ones_are_together():
    weight, states = torch.randn(40, 8).repeat(3, 1), torch.randn(1, 50, 8)
    moments = Moments(8, weight.device)
    moments.add(states, states)
    found = clusters(Readout(weight), [states], [states], moments).of_row
    assert (found.view(3, 40) == found[:40]).all()
    centres = torch.stack([weight[found == each].mean(0) for each in range(int(found.max()) + 1)])
    within = (weight - centres[found]).square().sum()
    assert within < 0.5 * (weight - weight.mean(0)).square().sum()


def test_rows_that_are_never_likely_have_the_hessian_of_all():
    weight = torch.cat([torch.randn(40, 8), torch.tensor([[-1000.0] + 7 * [0.0]]).repeat(40, 1)])
    states = torch.cat([torch.ones(1, 30, 1), torch.randn(1, 30, 7)], -1)
    moments = Moments(8, weight.device)
    moments.add(states, states)
    found = clusters(Readout(weight), [states], [states], moments)
    for each in found.of_row[40:].unique().tolist():
        torch.testing.assert_close(found.hessian[each], moments.hessian / moments.tokens)


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
    ridge = ridges(spread_of(Readout(model.lm_head.weight), [hidden]), [ids], k).double()
    hessian = states.T @ states / len(states)
    share = (ridge * error.square().sum(1) * _spread(states, model)).sum() / 2
    other = (torch.einsum("vk,kl,vl->v", error, hessian, error) * _spread(states, model)).sum() / 2
    assert share.item() == pytest.approx(embedded, rel=0.1)
    assert other.item() == pytest.approx(headed, rel=0.5)


def _spread(states, model):
    p = (states @ model.lm_head.weight.double().T).softmax(-1)
    return (p * (1 - p)).mean(0)
