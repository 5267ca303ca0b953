"""decode_attention against float64, at every tier."""

import pytest
import torch

from klfast import ops
from klfast.core.errors import InvalidInputError

# batch, heads, groups, keys, key width, value width
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 5, 5, 3, 8, 8),
    (1, 25, 5, 131, 64, 128),
    (3, 9, 1, 63, 7, 33),
    (2, 16, 2, 17, 100, 63),
    (1, 12, 4, 300, 48, 24),
]


def truth(q, k, v, scale):
    q, k, v = q.double(), k.double(), v.double()
    shared_by = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared_by, 1), v.repeat_interleave(shared_by, 1)
    return torch.einsum("bhs,bhsd->bhd", torch.einsum("bhd,bhsd->bhs", q, k).mul(scale).softmax(-1), v)


def inputs(batch, heads, groups, keys, key_dim, value_dim, dtype=torch.float32):
    return (
        torch.randn(batch, heads, key_dim).to(dtype),
        torch.randn(batch, groups, keys, key_dim).to(dtype),
        torch.randn(batch, groups, keys, value_dim).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype, tier):
    q, k, v = inputs(*shape, dtype)
    found = ops.decode_attention(q, k, v, 0.3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), truth(q, k, v, 0.3), rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_default_scale_is_that_of_sdpa(tier):
    q, k, v = inputs(2, 6, 2, 40, 16, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)
    torch.testing.assert_close(ops.decode_attention(q, k, v), expected, rtol=1e-5, atol=2e-6)


def test_any_strides_and_mixed_types(tier):
    q = torch.randn(2, 16, 6).transpose(1, 2)
    k = torch.randn(2, 40, 3, 16).transpose(1, 2).bfloat16()
    v = torch.randn(2, 3, 24, 41).half().transpose(2, 3)[:, :, 1:]
    for x in (q, k, v):
        assert not x.is_contiguous()
    torch.testing.assert_close(ops.decode_attention(q, k, v, 0.25).double(), truth(q, k, v, 0.25), rtol=1e-5, atol=2e-6)


def test_no_heads(tier):
    assert ops.decode_attention(*inputs(2, 0, 3, 5, 4, 8)).shape == (2, 0, 8)


def test_keys_of_width_zero_weigh_the_same(tier):
    q, k, v = inputs(2, 4, 2, 5, 0, 8)
    torch.testing.assert_close(ops.decode_attention(q, k, v), v.mean(2).repeat_interleave(2, 1))


def test_large_scores_stay_finite(tier):
    q, k, v = inputs(1, 4, 2, 70, 32, 32)
    torch.testing.assert_close(
        ops.decode_attention(q * 1e4, k, v, 1.0).double(), truth(q * 1e4, k, v, 1.0), rtol=1e-4, atol=1e-4
    )


def test_equal_terms_of_a_long_sum(tier):
    """Each rounds the same way; the first key outweighs them, so that they do not cancel in the division."""
    q, v, k = torch.ones(1, 2, 8), torch.ones(1, 1, 20000, 8), torch.zeros(1, 1, 20000, 8)
    k[..., 0, :] = 1.25
    of_torch = 1e-3  # its own products add up in float32 all the way
    found = ops.decode_attention(q, k, v, 1.0)
    torch.testing.assert_close(found, torch.ones(1, 2, 8), rtol=0, atol=of_torch if tier == "reference" else 5e-6)


def test_a_nan_shows(tier):
    q, k, v = inputs(1, 2, 2, 20, 16, 16)
    k[0, 1, 7, 3] = torch.nan
    found = ops.decode_attention(q, k, v)
    assert found[0, 0].isfinite().all() and found[0, 1].isnan().all()


def test_threads_do_not_matter():
    q, k, v = inputs(3, 8, 4, 500, 64, 64)
    found, threads = ops.decode_attention(q, k, v), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.decode_attention(q, k, v), found)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.double(), k, v), "q must be float32"),
        (lambda q, k, v: (q.sum(), k, v), "q must be float32, bfloat16 or float16 with 3"),
        (lambda q, k, v: (q, k[0], v), "k must be float32"),
        (lambda q, k, v: (q, k[..., 1:], v), "k must be"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), "v like k except"),
        (lambda q, k, v: (q[:, 1:], k, v), "divides the 5 heads"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "at least one key"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InvalidInputError, match=message):
        ops.decode_attention(*change(*inputs(2, 6, 2, 9, 16, 8)))


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.klfast.decode_attention.default, (*inputs(2, 6, 2, 9, 16, 8, dtype), 0.25))
