"""Calls that are done leave nothing behind. bench/leaks.py makes thousands of them; here a few are counted exactly."""

import ctypes
import gc
import sys
from functools import partial

import pytest
from safetensors.torch import load_file
from tiny_models import batch, tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.models.linears import linears

CALLS = 5


class Allocated(ctypes.Structure):
    """glibc's struct mallinfo2."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


@pytest.fixture(scope="module")
def taken():
    """Return what counts the bytes that malloc has given away, and the blocks that Python has."""
    try:
        allocated = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        pytest.skip("needs glibc 2.33, which counts what malloc has given away")
    allocated.restype = Allocated

    def count():
        gc.collect()
        found = allocated()
        return found.uordblks + found.hblkhd, sys.getallocatedblocks()

    return count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("leaks") / "model"
    model = tiny("mamba")
    klfast.quantize_model(model, Plan(dict.fromkeys(linears(model), QuantSpec(8, 64)), "uniform"))
    klfast.save_quantized(model, made)
    return made


def generate(folder):
    model = klfast.load_quantized(folder)
    return lambda: klfast.generate(model, batch(), 4)


def sweep(folder):
    model = tiny("mamba")
    return lambda: klfast.sweep(model, batch(), "int8", layers=["lm_head", "backbone.layers.0.mixer.in_proj"])


def load(folder):
    return lambda: klfast.generate(klfast.load_quantized(folder), batch(), 2)


@pytest.mark.parametrize("make", [generate, sweep, pytest.param(load, marks=pytest.mark.slow)])
def test_nothing_is_left_of_a_call(make, folder, taken):
    """Ignore what a first call keeps for later ones: a leak grows in every round."""
    call, read = make(folder), partial(load_file, folder / "model.safetensors")

    def grown(call):
        before = taken()
        for _ in range(CALLS):
            call()
        return [after - earlier for after, earlier in zip(taken(), before, strict=True)]

    rounds = []
    while len(rounds) < 4:
        memory, blocks = grown(call)
        if make is load:
            blocks -= grown(read)[1]  # safetensors 0.8 leaves two objects with each tensor
        if memory < 500 * CALLS and blocks < 20 * CALLS:
            return
        rounds.append((memory, blocks))
    pytest.fail(f"bytes of malloc, blocks of Python in rounds of {CALLS} calls: {rounds}")
