"""Forked processes go on with what their parent has used."""

import os

import other_process
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")]

BEGIN = """
import multiprocessing, os, signal, sys, threading
import torch, klfast
from klfast import ops
from tiny_models import tiny
torch.set_num_threads(3)
model, ids = tiny("jamba"), torch.arange(1, 20)[None]
engine = klfast.lower(model)
layer = klfast.QuantLinear.from_linear(torch.nn.Linear(2048, 512), "int4-g64-sym")
x = torch.randn(40, 2048)

@torch.inference_mode()
def results():
    signal.alarm(60)  # ends a process that waits for ever
    state = engine.state()
    products = [x @ x.T, torch.softmax(x, 1), layer(x), ops.linear(x.bfloat16(), torch.ones(512, 2048).bfloat16())]
    return [*products, engine(ids, state), engine(ids[:, :1], state), klfast.generate(model, ids, max_new_tokens=3)]

def same(found):
    return all(torch.allclose(a.float(), b.float(), 1e-4, 1e-4) for a, b in zip(found, expected, strict=True))

def in_child():
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if same(results()) else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1]

expected = results()
"""


def test_after_kernels_on_several_threads():
    other_process.run(
        BEGIN
        + """
assert in_child() == 0
with multiprocessing.get_context("fork").Pool(2) as pool:
    found = pool.apply(results)
assert same(found)
assert torch.get_num_threads() == 3 and same(results())
"""
    )


def test_while_another_thread_runs_the_engine():
    other_process.run(
        BEGIN
        + """
stop = threading.Event()
def work():
    state = engine.state()
    while not stop.is_set():
        engine(ids, state)
thread = threading.Thread(target=work)
thread.start()
ends = [in_child() for _ in range(20)]
stop.set()
thread.join()
assert ends == [0] * 20, ends
"""
    )
