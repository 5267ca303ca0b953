"""Helpers of the sweep's tests: random models far from uniform, snapshots, the naive computation of every metric."""

import torch
from tiny_models import VOCABULARY as VOCAB
from tiny_models import tiny

import klfast
from klfast.models.matrices import matrix
from klfast.sensitivity.comparison import SQNR_CAP

KL = "kl_teacher_student"


def make(family="mamba2", tied=False, seed=0):
    """Return a random model whose predictions are far from uniform."""
    return tiny(family, tied, seed=seed)


def tokens(windows=3, length=17, seed=1):
    return torch.randint(0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def naive(model, ids, name, spec, teacher=None):
    """Return all metrics, [B, T - 1] each, from whole logits and float64 log-probabilities.

    ``teacher`` are the logits of the model, if they are known.
    """
    weight = matrix(model, name).weight
    teacher, original = model(ids).logits if teacher is None else teacher, weight.clone()
    weight.copy_(klfast.quantize(weight, spec).dequantize(torch.float32))
    t, s = (logits[:, :-1].double() for logits in (teacher, model(ids).logits))
    weight.copy_(original)
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    noise = (s - t).square().sum(-1)
    return {
        KL: (p * (log_p - log_q)).sum(-1),
        "kl_student_teacher": (q * (log_q - log_p)).sum(-1),
        "jsd": (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2,
        "mse": noise / t.shape[-1],
        "sqnr_db": (10 * (t.square().sum(-1) / noise).log10()).clamp(max=SQNR_CAP),
        "delta_ce": (log_p - log_q).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1),
        "top1_agree": (t.argmax(-1) == s.argmax(-1)).double(),
    }


def means(sensitivities):
    """Return what was measured, by candidate, in words that compare: NaN, the error of one sequence, is not itself."""
    return {key: repr((m.mean, m.stderr, m.tokens, m.below_noise)) for key, m in sensitivities.measurements.items()}


def snapshot(model):
    """Return identity, storage, dtype and bits of every tensor, and every module's own attributes."""
    tensors = {
        name: (id(t), t.data_ptr(), t.dtype, t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()
    }
    return tensors, {
        name: (module.training, set(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()
    }


def assert_same(before, after):
    """Fail unless two snapshots of a model are equal."""
    assert before[1] == after[1]
    for name, (*facts, values) in before[0].items():
        assert facts == list(after[0][name][:3]) and torch.equal(values, after[0][name][3]), name
