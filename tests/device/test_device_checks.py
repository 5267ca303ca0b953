"""The cases of ``klfast doctor`` on the device at hand; some of them in the interpreter, which is slow."""

import pytest

from klfast import registry, selfcheck


@pytest.mark.parametrize("op", registry.op_names())
def test_every_kernel_passes(device, op):
    cases = selfcheck.cases(op)
    assert selfcheck.run(cases[::5] if device.type == "cpu" else cases, device=device.type).faults == ()
