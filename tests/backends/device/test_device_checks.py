"""The cases of ``klfast doctor`` on the available device; only some small ones in the interpreter, which is slow."""

import math

import pytest

from klfast.benchkit import op_cases
from klfast.diagnostics import op_checks
from klfast.dispatch import registry


def elements(case):
    return sum(math.prod(operand.shape) for operand in case.args)


@pytest.mark.parametrize("op", registry.op_names())
def test_every_kernel_passes(device, op):
    cases = op_cases.cases(op)
    if device.type == "cpu":
        cases = sorted(cases, key=elements)[: (len(cases) + 1) // 2 : max(4, len(cases) // 6)]
    assert op_checks.run(cases, device=device.type).faults == ()
