"""gathered_logits at every tier against products in float64."""

import pytest
import torch

from klfast import ops
from klfast.core.errors import InvalidInputError


def truth(hidden, head, index):
    return (hidden.double() @ head.double().T).gather(-1, index.expand(*hidden.shape[:-1], index.shape[-1]))


@pytest.mark.parametrize(
    ("students", "tokens", "features", "entries"),
    [((), 3, 37, 5), ((1,), 1, 1, 1), ((2, 3), 5, 64, 6), ((9,), 2, 99, 40)],
)
def test_random_states(students, tokens, features, entries, tier):
    for dtype, head_dtype in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2):
        hidden = torch.randn(*students, tokens, features).to(dtype)
        head, index = torch.randn(41, features).to(head_dtype), torch.randint(41, (tokens, entries))
        found = ops.gathered_logits(hidden, head, index)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth(hidden, head, index), rtol=1e-5, atol=1e-5)


def test_any_strides_and_no_elements(tier):
    hidden, head = torch.randn(19, 3, 5).transpose(0, 2), torch.randn(38, 41).T[:, ::2]
    index = torch.randint(41, (4, 3)).T
    torch.testing.assert_close(
        ops.gathered_logits(hidden, head, index).double(), truth(hidden, head, index), rtol=1e-5, atol=1e-5
    )
    assert ops.gathered_logits(hidden[:, :0], head, index[:0]).shape == (5, 0, 4)
    assert ops.gathered_logits(hidden[:0], head, index).shape == (0, 3, 4)
    assert ops.gathered_logits(hidden, head, index[:, :0]).shape == (5, 3, 0)


def test_opcheck():
    arguments = torch.randn(2, 3, 5), torch.randn(7, 5), torch.randint(7, (3, 4))
    torch.library.opcheck(torch.ops.klfast.gathered_logits.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=torch.ones(5)), r"hidden must be \[\.\.\., T, H\], got \[5\]"),
        (dict(head=torch.ones(7, 4)), r"head must be \[V, 5\], got \[7, 4\]"),
        (dict(head=torch.ones(7, 5, dtype=torch.float64)), "head must be float32"),
        (dict(rows=torch.zeros(2, 4, dtype=torch.int64)), r"rows must be int64 \[3, J\], got int64 \[2, 4\]"),
        (dict(rows=torch.zeros(3, 4)), r"rows must be int64 \[3, J\], got float32 \[3, 4\]"),
        (dict(rows=torch.full((3, 4), 7)), r"rows must be in 0\.\.6, got 7"),
        (dict(rows=torch.full((3, 4), -1)), r"rows must be in 0\.\.6, got -1"),
    ],
)
def test_bad_input(change, message, tier):
    arguments = dict(hidden=torch.ones(2, 3, 5), head=torch.ones(7, 5), rows=torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match=message) as caught:
        ops.gathered_logits(**arguments | change)
    assert "\n" not in str(caught.value)
