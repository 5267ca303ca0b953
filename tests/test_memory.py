"""Large outputs: one freed block serves the next, and never while anything still looks at it."""

import gc

import pytest
import torch

from klfast.backends import memory

LARGE = (4096, 1100)  # of float32: beyond the size from which blocks are kept


@pytest.fixture(autouse=True)
def _nothing_kept():
    gc.collect()
    memory._kept.clear()
    yield
    memory._kept.clear()


def test_tensors_in_use_never_share_memory():
    first = memory.empty(*LARGE, dtype=torch.float32).fill_(1)
    second = memory.empty(*LARGE, dtype=torch.float32).fill_(2)
    row = first[7]
    del first
    third = memory.empty(*LARGE, dtype=torch.float32).fill_(3)  # a view still holds the first
    assert (row == 1).all() and (second == 2).all() and (third == 3).all()


def test_a_freed_block_serves_the_next():
    first = memory.empty(*LARGE, dtype=torch.float32)
    address = first.data_ptr()
    del first
    again = memory.empty(LARGE[0] - 5, LARGE[1], dtype=torch.float32)
    assert again.data_ptr() == address
    again.fill_(1)
    assert memory.empty(*LARGE, dtype=torch.float32).data_ptr() != address


def test_a_block_more_than_twice_as_large_is_left_alone():
    large = memory.empty(3 * LARGE[0], LARGE[1], dtype=torch.float32)
    del large
    kept = list(memory._kept)
    small = memory.empty(*LARGE, dtype=torch.float32)
    assert len(kept) == 1 and memory._kept == kept and small.shape == LARGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_dtype(dtype):
    for shape in ((3, 5), (0, 7), (3000, 2, 1500)):
        found = memory.empty(*shape, dtype=dtype)
        assert found.shape == shape and found.dtype == dtype and found.is_contiguous()
