"""Which implementations this machine can run, and whether they are right: ``klfast.doctor``."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass

import torch

import klfast
from klfast.core.errors import one_line
from klfast.core.machine import cpu_name, extension, installed_version
from klfast.dispatch import pins, registry


@dataclass(frozen=True)
class Check:
    """One op at one tier against the reference: the relative error of the case nearest to its tolerance."""

    op: str
    tier: str
    error: float
    passed: bool
    message: str = ""


@dataclass(frozen=True)
class Report:
    """Results of ``doctor``. ``tiers`` maps each CPU tier to the reason why it cannot run, empty if it can."""

    versions: dict[str, str]
    cpu: str
    cores: int
    threads: int
    tiers: dict[str, str]
    environment: dict[str, str]
    extension: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if there are checks and all passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        """Return the report for JSON."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines.append(f"{self.cpu}; {self.cores} cores, {self.threads} threads")
        lines.append(f"extension: {self.extension}")
        lines += [f"{name}={value}" for name, value in self.environment.items()]
        lines.append("CPU tiers:")
        lines += [f"  {tier:<11} {'no: ' + reason if reason else 'yes'}" for tier, reason in self.tiers.items()]
        lines.append(
            "Ops against the reference (error of the case nearest to its tolerance, relative to the largest value):"
        )
        for op in dict.fromkeys(check.op for check in self.checks):
            results = (
                f"{c.tier} {c.error:.0e}" + ("" if c.passed else f" FAILED {c.message}")
                for c in self.checks
                if c.op == op
            )
            lines.append(f"  {op}: {', '.join(results)}")
        lines.append("All is well." if self.passed else "Something is wrong; see above.")
        return "\n".join(lines)


def doctor() -> Report:
    """Inspect this machine and check every op on small cases at every CPU tier it has. Takes a few seconds."""
    from klfast import ops  # noqa: F401 (defines the ops)

    return Report(
        versions={
            "klfast": klfast.__version__,
            "python": platform.python_version(),
            **{name: installed_version(name) for name in ("torch", "transformers", "triton")},
        },
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        tiers={tier: pins.why_not(tier) for tier in pins.CPU_TIERS},
        environment={name: os.environ.get(name, "") for name in ("KLFAST_ISA", "KLFAST_STRICT")},
        extension=extension(),
        checks=tuple(_check(op, tier) for op in registry.op_names() for tier in pins.available_tiers()),
    )


def _check(op: str, tier: str) -> Check:
    from klfast.benchkit import op_cases
    from klfast.diagnostics import op_checks

    if not registry.has_kernel(op, "CPU"):
        return Check(
            op, tier, float("nan"), False, f"the slow reference would run: {registry.why_no_kernel('cpu', op)}"
        )
    try:
        found = op_checks.run(op_cases.cases(op), tier)
    except Exception as failure:  # noqa: BLE001 (a case that cannot be made: the extension may be of another version)
        return Check(op, tier, float("nan"), False, one_line(failure))
    return Check(op, tier, found.error, not found.faults, "; ".join(found.faults[:1]))
