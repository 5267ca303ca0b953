"""Memory that is kept between large tensors."""

import subprocess
import sys

import pytest

from klfast.core import heap

COUNT = """
import contextlib, resource, sys, torch
from klfast.core import heap
def faults(way):
    with way:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(40):
            torch.empty(2**24).fill_(1)  # 64 MiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(contextlib.nullcontext()), faults(heap.kept()))
"""


@pytest.mark.skipif(heap._glibc() is None, reason="needs glibc")
def test_pages_are_made_once_while_it_is_kept():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    before, meanwhile = map(int, done.stdout.split())
    assert 2 * meanwhile < before  # glibc before 2.38 does not reuse all freed blocks


def test_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.kept():
        pass
