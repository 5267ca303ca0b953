"""Pins of tiers: what runs where an op has no kernel of the pinned one, and what is said without the extension."""

import other_process
import pytest

from klfast import _C
from klfast.dispatch import pins

TIERS = {name: i for i, name in enumerate(pins.CPU_TIERS)}


def test_fallbacks_end_at_scalar_and_are_no_total_order():
    for tier, i in TIERS.items():
        assert _C.allows(i, i) and _C.allows(i, TIERS["scalar"]) and _C.allows(_C.any_tier, i)
        assert not any(_C.allows(i, j) and _C.allows(j, i) for other, j in TIERS.items() if other != tier)
    assert _C.allows(TIERS["avx512vnni"], TIERS["avx2"]) and _C.allows(TIERS["avxvnni"], TIERS["avx2"])
    assert not _C.allows(TIERS["avx512vnni"], TIERS["avxvnni"])


@pytest.mark.parametrize("op", sorted(_C.kernel_tiers()))
def test_the_best_kernel_that_a_pin_allows_runs(op):
    runnable = [tier for tier in TIERS if tier in _C.kernel_tiers()[op] and not pins.why_not(tier)]
    assert pins.CPU_TIERS[_C.best_tier(op, _C.any_tier)] == runnable[-1]
    for limit in TIERS.values():
        allowed = [tier for tier in runnable if _C.allows(limit, TIERS[tier])]
        assert pins.CPU_TIERS[_C.best_tier(op, limit)] == allowed[-1]


def test_without_the_extension_a_pin_names_the_reason_and_help_works():
    other_process.run(
        """
        import sys
        sys.modules["klfast._C"] = None  # importing it fails
        from typer.testing import CliRunner
        import klfast
        from klfast.cli import app
        assert "TIER" in CliRunner().invoke(app, ["bench", "--help"]).output
        failed = CliRunner().invoke(app, ["bench", "--isa", "avx2"])
        assert failed.exit_code == 1 and "the extension klfast._C cannot be imported" in failed.stderr, failed.output
        try:
            klfast.using("avx2").__enter__()
        except klfast.KernelUnavailableError as error:
            assert "using: avx2 cannot run here: the extension klfast._C cannot be imported" in str(error), error
        else:
            raise AssertionError
        with klfast.using("reference"):
            pass
        """
    )


def test_help_imports_neither_the_extension_nor_torch():
    other_process.run(
        """
        import sys
        from typer.testing import CliRunner
        from klfast.cli import app
        assert CliRunner().invoke(app, ["bench", "--help"]).exit_code == 0
        assert "klfast._C" not in sys.modules and "torch" not in sys.modules
        """
    )
