"""``klfast doctor --device``: facts, checks and bench of one device as one text that grows while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

import torch

from klfast import registry, selfcheck
from klfast.device import bench, facts
from klfast.device.timing import Clock
from klfast.errors import one_line
from klfast.files import write_atomic

PASS, FAIL, NONE = "pass", "FAIL", "none"  # NONE: klfast has no kernel for such devices, its plain reference runs
_MOST_FAULTS = 12  # that are listed for a kernel


@dataclass(frozen=True)
class Check:
    """A kernel on the device: PASS, FAIL or NONE; ``outcome`` where cases were run, else a ``reason``."""

    kernel: str
    status: str
    outcome: selfcheck.Outcome | None = None
    reason: str = ""

    def __str__(self) -> str:
        line = f"{self.status}  {self.kernel:<26}"
        if self.outcome is None:
            return f"{line} {self.reason}"
        found = self.outcome
        line += f" {found.cases:>3} cases"
        if found.worst:
            line += f", largest error {found.error:.1e} of {found.tolerance:.0e} allowed ({found.worst})"
        more = len(found.faults) - _MOST_FAULTS
        return "\n        ".join([line, *found.faults[:_MOST_FAULTS], *[f"and {more} more"] * (more > 0)])


@dataclass
class Report:
    """What was found: ``facts`` by name, a ``Check`` for each kernel, the bench's rows."""

    device: str
    facts: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    bench: list[bench.Row] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Names of the kernels that failed."""
        return [check.kernel for check in self.checks if check.status == FAIL]

    def as_dict(self) -> dict:
        return {**asdict(self), "passed": not self.failed}


class _Text:
    """The report's lines, shown as they come; the file holds all so far, and what runs now, in case it never returns."""

    def __init__(self, say: Callable[[str], None], out: Path | None) -> None:
        self._say, self._out, self._lines = say, out, []

    def add(self, line: str) -> None:
        self._lines.append(line)
        self._say(line)
        self._write(self._lines)

    def now(self, what: str) -> None:
        self._write([*self._lines, f"({what} runs; if nothing follows, it ended the run)"])

    def _write(self, lines: list[str]) -> None:
        if self._out is not None:
            write_atomic(self._out, "\n".join(lines) + "\n")


def run(device: str, seconds: float = 60.0, out: Path | None = None, say: Callable[[str], None] = print) -> Report:
    """Check every kernel on a device, then time some.

    Args:
        device: "cpu", "cuda" or "xpu".
        seconds: for the bench, at most ``bench.PATIENCE`` times as long with compilation and checks; 0 leaves it out.
        out: a file for the text, written anew with each line.
        say: gets each line.

    Raises:
        KernelUnavailableError: torch cannot compute on such a device; says what to do.
    """
    facts.require(device)
    found, text = Report(device), _Text(say, out)
    text.add(f"klfast doctor --device {device}, {datetime.now(timezone.utc).isoformat(timespec='seconds')}")
    text.now("torch's look at the device")
    found.facts = facts.gather(device)
    for name, value in found.facts.items():
        text.add(f"  {name}: {value}")
    text.add("\nKernels against klfast's reference on the CPU (errors relative to the largest value; the first run compiles):")
    for op in registry.op_names():
        for check in run_checks(op, device, text.now):
            found.checks.append(check)
            text.add(str(check))
    if seconds:
        _bench(found, text, seconds)
    text.add(f"\n{len(found.failed)} of {len(found.checks)} kernels failed: {', '.join(found.failed)}" if found.failed else "\nAll kernels passed.")
    return found


def run_checks(op: str, device: str, tell: Callable[[str], None]) -> Iterator[Check]:
    """Of each of an op's kernels, as torch dispatches the op to the device."""
    from klfast.backends.triton import KERNELS

    if not registry.has_kernel(op, device.upper()):
        yield Check(op, FAIL if device == "cpu" or op in KERNELS else NONE, reason=registry.why_no_kernel(device))
        return
    try:
        cases = selfcheck.cases(op)
    except Exception as error:
        yield Check(op, FAIL, reason=f"its cases cannot be made: {one_line(error)}")
        return
    for kernel, some in groupby(sorted(cases, key=lambda case: case.kernel), lambda case: case.kernel):
        outcome = selfcheck.run(list(some), device=device, tell=tell)
        yield Check(kernel, FAIL if outcome.faults else PASS, outcome)


def _bench(found: Report, text: _Text, seconds: float) -> None:
    text.now("the clock")
    clock = Clock(found.device)
    text.add(f"\nMedian times by {clock.by}; x: times as fast as the first of the group that is not klfast's:")
    torch.manual_seed(0)
    with torch.inference_mode():
        for rows in bench.run(bench.groups(found.device), clock, seconds, text.now):
            found.bench += rows
            text.add("\n".join([f"  {rows[0].group}", *map(str, rows)]))
