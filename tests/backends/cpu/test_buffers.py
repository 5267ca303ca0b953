"""Large outputs: a freed block serves the next one, but never while it is still referenced."""

import gc
import mmap
from pathlib import Path

import other_process
import pytest
import torch

from klfast.backends.cpu import buffers, extension
from klfast.core.errors import InvalidInputError

LARGE = (4096, 1100)  # of float32: large enough for the block to be kept


@pytest.fixture(autouse=True)
def _nothing_kept():
    gc.collect()
    buffers.kept.clear()
    yield
    buffers.kept.clear()


def test_tensors_in_use_never_share_memory():
    first = buffers.empty(*LARGE, dtype=torch.float32).fill_(1)
    second = buffers.empty(*LARGE, dtype=torch.float32).fill_(2)
    row = first[7]
    del first
    third = buffers.empty(*LARGE, dtype=torch.float32).fill_(3)  # a view still holds the first
    assert (row == 1).all() and (second == 2).all() and (third == 3).all()


def test_a_freed_block_serves_the_next():
    first = buffers.empty(*LARGE, dtype=torch.float32)
    address = first.data_ptr()
    del first
    again = buffers.empty(LARGE[0] - 5, LARGE[1], dtype=torch.float32)
    assert again.data_ptr() == address
    again.fill_(1)
    assert buffers.empty(*LARGE, dtype=torch.float32).data_ptr() != address


def test_a_block_more_than_twice_as_large_is_left_alone():
    large = buffers.empty(3 * LARGE[0], LARGE[1], dtype=torch.float32)
    del large
    kept = list(buffers.kept)
    small = buffers.empty(*LARGE, dtype=torch.float32)
    assert len(kept) == 1 and list(buffers.kept) == kept and small.shape == LARGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_dtype(dtype):
    for shape in ((3, 5), (0, 7), (3000, 2, 1500)):
        found = buffers.empty(*shape, dtype=dtype)
        assert found.shape == shape and found.dtype == dtype and found.is_contiguous()


# Forks: each in its own process with one thread, since OpenMP's threads do not survive a fork.

BEGIN = """
import os, sys, torch
from klfast import ops
torch.set_num_threads(1)

def large(value):  # 4.9 million results, in klfast's own memory
    return ops.linear(torch.full((600, 16), value).bfloat16(), torch.ones(8192, 16).bfloat16(), dtype=torch.float32)

def forked(work, wait=True):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    if wait:
        assert os.waitpid(pid, 0)[1] == 0
    return pid
"""


@pytest.mark.slow
def test_a_write_in_a_forked_child_does_not_reach_the_parent_or_the_other_way_round():
    other_process.run(
        BEGIN
        + """
y = large(1.0)
forked(lambda: (y.mul_(100) == 1600).all())
assert (y == 16).all()
from_parent, to_child = os.pipe()
def late():
    os.read(from_parent, 1)  # until the parent has written
    return (y == 16).all()
child = forked(late, wait=False)
y.fill_(5)
os.write(to_child, b"x")
assert os.waitpid(child, 0)[1] == 0
"""
    )


@pytest.mark.slow
def test_forked_workers_that_reuse_a_kept_block_do_not_share_it():
    other_process.run(
        BEGIN
        + """
import time
large(1.0)  # its block is kept, and each child inherits it
def work(value):
    y = large(value)
    time.sleep(1.0)
    return (y == 16 * value).all()
children = [forked(lambda: work(float(i)), wait=False) for i in range(2, 5)]
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
"""
    )


@pytest.mark.slow
def test_pools_and_data_loaders():
    other_process.run(
        BEGIN
        + """
import multiprocessing, time

def score(value):
    y = large(float(value))
    time.sleep(0.05)
    return float(y.double().mean()), y[:3, :5]

class Scores(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i):
        y = large(float(i))
        time.sleep(0.05)
        return y[0, :3], y.mean()

large(1.0)
with multiprocessing.get_context("fork").Pool(4) as pool:
    found = pool.map(score, range(12), chunksize=1)
assert [mean for mean, _ in found] == [16.0 * i for i in range(12)]
assert all((part == 16 * i).all() for i, (_, part) in enumerate(found))
loader = torch.utils.data.DataLoader(Scores(), num_workers=2, multiprocessing_context="fork")
assert [float(mean) for _, mean in loader] == [16.0 * i for i in range(8)]
"""
    )


@pytest.mark.slow
def test_a_fork_at_any_moment_leaves_the_child_able_to_allocate():
    """While another thread takes and frees blocks."""
    other_process.run(
        BEGIN
        + """
import signal, threading
from klfast.backends.cpu import buffers, extension
stop = threading.Event()
def churn():
    while not stop.is_set():
        buffers.empty(5, 1 << 20, dtype=torch.float32)
thread = threading.Thread(target=churn)
thread.start()
def work():
    signal.alarm(20)  # ends a deadlocked child
    return all(buffers.empty(5, 1 << 20, dtype=torch.float32).shape == (5, 1 << 20) for _ in range(3))
for _ in range(60):
    forked(work)
stop.set()
thread.join()
"""
    )


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages to advise"
)
def test_the_system_takes_both_hints(monkeypatch):
    advised = []

    def strictly(block, name):
        block.madvise(getattr(mmap, name))  # OSError if the system refuses
        advised.append(name)

    monkeypatch.setattr(buffers, "advise", strictly)
    buffers.empty(*LARGE, dtype=torch.float32).fill_(1)
    gc.collect()
    assert advised == ["MADV_HUGEPAGE", "MADV_FREE"]


def test_a_finalizer_may_run_while_a_block_is_taken():
    """The garbage collector may run one at any point: its block is kept, and nothing deadlocks."""
    other = buffers.take(17 << 20)

    class Block(bytes):
        def __len__(self):
            buffers.keep(other)
            return 1

    buffers.kept.append(Block())
    assert buffers.take(17 << 20) is not other


def test_no_memory_is_a_memory_error():
    with pytest.raises(MemoryError, match="4611686018427387904 bytes"):
        buffers.empty(1 << 60, dtype=torch.float32)


def test_a_tensor_without_memory_is_refused():
    freed = torch.ones(3, 4)
    freed.untyped_storage().resize_(0)
    for describe in (extension.address, extension.view):
        with pytest.raises(InvalidInputError, match=r"a \[3, 4\] tensor has no memory: its storage was freed"):
            describe(freed)
        describe(torch.empty(0, 4))
    assert extension.address(None) == 0 and extension.view(None) is None
