"""Inputs of before and some new ones for the fuzzer of the kernels."""

import re
from pathlib import Path

import csrc_program
import kernels_fuzzer
import pytest
import sanitizers

from klfast import _C

CALLED_BY = {"linear_divergence": "accumulate"}


@pytest.fixture(scope="module")
def program():
    if not (csrc_program.ROOT / "setup.py").is_file():
        pytest.skip("needs a source tree")
    if complaint := sanitizers.why_no_clang():
        pytest.skip(complaint)
    return kernels_fuzzer.build()


@pytest.mark.slow
def test_inputs_of_before(program):
    assert kernels_fuzzer.run(program, *map(str, kernels_fuzzer.FOUND)) == 0


@pytest.mark.slow
def test_new_inputs(program, tmp_path):
    assert kernels_fuzzer.run(program, "-runs=5000", "-seed=1", str(tmp_path)) == 0


def test_no_op_is_left_out():
    called = set(re.findall(r"call_(\w+)", Path(__file__).with_name("calls.h").read_text()))
    assert {CALLED_BY.get(op, op) for op in _C.kernel_tiers()} <= called
