"""``klfast doctor --device``: facts, checks and timings of a device as one text that grows while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from klfast.benchkit import device_facts
from klfast.benchkit.clock import Clock
from klfast.core import machine
from klfast.core.io import write_atomic
from klfast.diagnostics import device_bench as bench
from klfast.diagnostics import kernel_checks
from klfast.diagnostics.kernel_checks import FAIL, Check
from klfast.dispatch import registry


@dataclass
class Report:
    """Results: ``facts`` by name, a ``Check`` per kernel, the bench's rows."""

    device: str
    facts: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    bench: list[bench.Row] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Names of the kernels that failed."""
        return [check.kernel for check in self.checks if check.status == FAIL]

    def as_dict(self) -> dict[str, object]:
        """Return the report for JSON."""
        return {**asdict(self), "passed": not self.failed}


class _Text:
    """The report's lines, shown as they come; the file also names the running step, which may crash the process."""

    def __init__(self, say: Callable[[str], None], out: Path | None) -> None:
        self._say, self._out = say, out
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        self._lines.append(line)
        self._say(line)
        self._write(self._lines)

    def now(self, what: str) -> None:
        self._write([*self._lines, f"({what} is running; if nothing follows, it ended the run)"])

    def _write(self, lines: list[str]) -> None:
        if self._out is not None:
            write_atomic(self._out, "\n".join(lines) + "\n")


def run(device: str, seconds: float = 60.0, out: Path | None = None, say: Callable[[str], None] = print) -> Report:
    """Check every kernel on a device, then time some.

    Args:
        device: "cpu", "cuda" or "xpu".
        seconds: time for the bench, up to ``bench.PATIENCE`` times as long with compilation and checks; 0 skips it.
        out: a file for the text, rewritten with each line.
        say: called with each line.

    Raises:
        KernelUnavailableError: torch cannot use such a device; the message has a remedy.
    """
    machine.require(device)
    found, text = Report(device), _Text(say, out)
    text.add(f"klfast doctor --device {device}, {datetime.now(timezone.utc).isoformat(timespec='seconds')}")
    text.now("torch's query of the device")
    found.facts = device_facts.gather(device)
    for name, value in found.facts.items():
        text.add(f"  {name}: {value}")
    text.add(
        "\nKernels against the reference on the CPU (errors relative to the largest value; the first run compiles):"
    )
    for op in registry.op_names():
        for check in kernel_checks.of_op(op, device, text.now):
            found.checks.append(check)
            text.add(str(check))
    if seconds:
        _bench(found, text, seconds)
    text.add(
        f"\n{len(found.failed)} of {len(found.checks)} kernels failed: {', '.join(found.failed)}"
        if found.failed
        else "\nAll kernels passed."
    )
    return found


def _bench(found: Report, text: _Text, seconds: float) -> None:
    text.now("the clock")
    clock = Clock(found.device)
    text.add(f"\nMedian times by {clock.by}; x: speedup over the first of the group that is not klfast's:")
    torch.manual_seed(0)
    with torch.inference_mode():
        for rows in bench.run(bench.groups(found.device), clock, seconds, text.now):
            found.bench += rows
            text.add("\n".join([f"  {rows[0].group}", *map(str, rows)]))
