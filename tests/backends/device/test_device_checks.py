"""The cases of ``klfast doctor`` on the available device; only some in the interpreter, which is slow."""

import pytest

from klfast.benchkit import op_cases
from klfast.diagnostics import op_checks
from klfast.dispatch import registry


@pytest.mark.parametrize("op", registry.op_names())
def test_every_kernel_passes(device, op):
    cases = op_cases.cases(op)
    assert op_checks.run(cases[::5] if device.type == "cpu" else cases, device=device.type).faults == ()
