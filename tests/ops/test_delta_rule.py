"""The gated delta rule at every tier against a float64 recurrence written step by step, and against transformers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from ssm_truth import close, make, poison

from klfast import ops
from klfast.core.errors import InvalidInputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("head", "channel")  # one decay a head (gated delta net), or one a key channel (KDA)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


def operands(batch, length, groups, heads, key_dim, value_dim, form="head", dtype=torch.float32, last=3):
    q, k = (make(batch, length, groups, key_dim, dtype=dtype, last=last) for _ in range(2))
    v = make(batch, length, heads, value_dim, dtype=dtype, last=last)
    g = -F.softplus(make(batch, length, heads, *([key_dim] if form == "channel" else [])))
    return q, k, v, g, make(batch, length, heads).sigmoid().to(dtype)


def run(form, recurrent, *args, **options):
    name = {"head": "gated_delta_rule", "channel": "kda"}[form]
    return getattr(ops, ("fused_recurrent_" if recurrent else "chunk_") + name)(*args, **options)


def truth(q, k, v, g, beta, state=None, normalize=True, scale=None):
    q, k, v, g, beta = (t.double() for t in (q, k, v, g, beta))
    if normalize:
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))
    batch, length, heads, key_dim = k.shape
    S = torch.zeros(batch, heads, key_dim, v.shape[3]).double() if state is None else state.double()
    out = torch.zeros(v.shape).double()
    for t in range(length):
        S = S * (g if g.dim() == 4 else g[..., None])[:, t, ..., None].exp()
        change = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], change)
        out[:, t] = torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * (key_dim**-0.5 if scale is None else scale)
    return out, S


SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 5, 1, 3, 7, 5),
    (1, 33, 2, 4, 16, 16),
    (2, 70, 2, 2, 40, 24),
    (1, 65, 3, 6, 64, 64),
    (1, 34, 1, 2, 128, 150),
    (0, 3, 1, 1, 4, 4),
    (1, 0, 1, 2, 4, 4),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, form, tier):
    for dtype, last, normalize in [
        (DTYPES[0], 3, True),
        (DTYPES[1], 1, True),
        (DTYPES[2], 3, False),
        (DTYPES[0], 2, False),
    ]:
        args = operands(*shape, form, dtype, last)
        if not normalize:
            args = (args[0], F.normalize(args[1].float(), dim=-1).to(dtype), *args[2:])
        initial = make(shape[0], shape[3], shape[4], shape[5])
        for start, recurrent in ((None, False), (initial, True)):
            options = {"initial_state": start, "output_final_state": True, "use_qk_l2norm_in_kernel": normalize}
            out, state = run(form, recurrent, *args, **options)
            expected, last_state = truth(*args, start, normalize)
            assert out.dtype == dtype and state.dtype == torch.float32
            close(out, expected, dtype)
            close(state, last_state, factor=4)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_final_state_there_is_none_and_the_initial_one_stays(form, tier):
    args, initial = operands(1, 4, 1, 2, 5, 6, form), make(1, 2, 5, 6)
    before = initial.clone()
    assert run(form, False, *args, initial_state=initial)[1] is None
    assert torch.equal(initial, before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value_dim", [32, 21])
def test_update_continues_a_sequence(value_dim, form, tier):
    args = operands(2, 12, 2, 4, 16, value_dim, form)
    expected, last = truth(*args)
    for dtype, lengths in ((torch.float32, [5, 1, 1, 4, 1]), (torch.float32, [1] * 12), (torch.bfloat16, [12])):
        for order in ((0, 1, 2, 3), (0, 2, 1, 3)):
            memory = torch.zeros([(2, 4, 16, value_dim)[i] for i in order], dtype=dtype)
            state = memory.permute(*(order.index(i) for i in range(4)))
            pieces = zip(*(t.split(lengths, 1) for t in args), strict=True)
            out = [ops.gated_delta_rule_update(state, *each, use_qk_l2norm_in_kernel=True) for each in pieces]
            close(torch.cat(out, 1), expected)
            close(state, last, dtype, factor=2)


def test_scale(tier):
    args = operands(1, 6, 1, 2, 8, 8)
    out, _ = ops.chunk_gated_delta_rule(*args, scale=0.3, use_qk_l2norm_in_kernel=True)
    close(out, truth(*args, scale=0.3)[0])


@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_equal_each_alone(form, tier):
    args, bounds = operands(1, 17, 2, 4, 8, 12, form), [0, 5, 5, 6, 17]
    initial = make(4, 4, 8, 12)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    out, states = run(form, False, *args, initial_state=initial, cu_seqlens=torch.tensor(bounds), **options)
    for i, (first, end) in enumerate(itertools.pairwise(bounds)):
        piece = [t[:, first:end] for t in args]
        expected, last = truth(*piece, initial[i : i + 1])
        close(out[:, first:end], expected)
        close(states[i : i + 1], last, factor=4)


@pytest.mark.parametrize("model", ["qwen3_5", "kimi_linear"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_equals_transformers(recurrent, model, tier):
    form = "head" if model == "qwen3_5" else "channel"
    if form == "head":
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule as chunk
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule as steps
    else:
        from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention as chunk
        from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention as steps
    args, initial = (
        operands(2, 70, 3, 6 if form == "head" else 3, 16, 20, form),
        make(2, 6 if form == "head" else 3, 16, 20),
    )
    options = {"initial_state": initial, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    q, k, *rest = args
    if form == "head":  # transformers 5.20 wants as many heads of keys as of values
        q, k = (t.repeat_interleave(2, 2) for t in (q, k))
    theirs = (steps if recurrent else chunk)(q, k, *rest, **options)
    for found, expected in zip(run(form, recurrent, *args, **options), theirs, strict=True):
        close(found, expected.double(), factor=5)


def test_extreme_decays(tier):
    """A decay of 0 forgets all, one of 1 nothing; both are exact."""
    q, k, v, g, beta = operands(1, 40, 1, 2, 8, 16)
    for value in (0.0, -200.0, -torch.inf):
        decays = torch.full_like(g, value)
        out, state = ops.chunk_gated_delta_rule(
            q, k, v, decays, beta, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        expected, last = truth(q, k, v, decays, beta)
        close(out, expected)
        close(state, last, factor=4)


def test_not_finite_values_stay_in_their_head(tier):
    q, k, v, g, beta = operands(1, 9, 1, 3, 8, 16)
    v[0, 4, 1, 3] = torch.nan
    out, _ = ops.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
    assert out[:, :, [0, 2]].isfinite().all() and out[:, :4].isfinite().all()
    assert out[0, 4:, 1, 3].isnan().all() and out[0, :, 1, :3].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 4, 2, 9)}, "q must be"),
        ({"k": (1, 4, 3, 8), "q": (1, 4, 3, 8)}, "must divide the 4 heads of v, got 3"),
        ({"k": (1, 4, 2, 0), "q": (1, 4, 2, 0)}, "at least one channel"),
        ({"g": (1, 4, 4, 8)}, r"g \[B, L, H\], got"),
        ({"beta": (1, 4, 2)}, "beta must be"),
        ({"v": (4, 4, 6)}, "v .B, L, H, V. and g"),
        ({"initial_state": (2, 4, 8, 6)}, r"initial_state must be \[1, 4, 8, 6\], got \[2, 4, 8, 6\]"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    shapes = {"q": (1, 4, 2, 8), "k": (1, 4, 2, 8), "v": (1, 4, 4, 6), "g": (1, 4, 4), "beta": (1, 4, 4)} | change
    with pytest.raises(InvalidInputError, match=message):
        ops.chunk_gated_delta_rule(**{name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("bounds", [[0, 3], [0, 5, 4, 6], [1, 6], [6], [0, 3, 7]])
def test_wrong_limits_of_packed_sequences_are_refused(bounds):
    with pytest.raises(InvalidInputError, match="cu_seqlens must rise from 0 to 6"):
        ops.chunk_gated_delta_rule(*operands(1, 6, 1, 1, 4, 4), cu_seqlens=torch.tensor(bounds))


def test_state_that_cannot_be_written_is_refused():
    args = operands(1, 1, 1, 2, 4, 4)
    with pytest.raises(InvalidInputError, match="share memory"):
        ops.gated_delta_rule_update(torch.zeros(1, 1, 4, 4).expand(1, 2, 4, 4), *args)
    with pytest.raises(InvalidInputError, match="must be"):
        ops.gated_delta_rule_update(torch.zeros(1, 2, 4, 4, dtype=torch.int8), *args)
