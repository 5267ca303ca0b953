"""Checks of ``klfast doctor --device``.

On a GPU each kernel is checked in a separate process, since after an illegal access, or if the driver ends the
process, all other kernels would only repeat the error. ``python -m klfast.diagnostics.kernel_checks DEVICE OP KERNEL``
is such a process; it writes lines of JSON.
"""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import klfast
from klfast.benchkit import op_cases
from klfast.core.errors import one_line, shortened
from klfast.diagnostics import op_checks
from klfast.dispatch import registry

PASS, FAIL, NONE = "pass", "FAIL", "none"  # NONE: klfast has no kernel for such devices, the reference runs
PATIENCE = 900.0  # most seconds between two cases of a process, compilation included
PAUSE = 2.0  # seconds before the second try of a process that the machine had no room for
_NO_ROOM = tuple(map(os.strerror, (errno.EAGAIN, errno.ENOMEM)))  # for processes and threads, or their memory
_MOST_FAULTS = 12  # listed for a kernel


@dataclass(frozen=True)
class Check:
    """A kernel on the device: PASS, FAIL or NONE, with the ``outcome`` if cases were run, else a ``reason``."""

    kernel: str
    status: str
    outcome: op_checks.Outcome | None = None
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


def of_op(op: str, device: str, tell: Callable[[str], None]) -> Iterator[Check]:
    """Yield the check of each of an op's kernels, as torch dispatches the op to the device.

    ``tell`` gets the name of each case before it runs.
    """
    from klfast.backends.triton import KERNELS

    if not registry.has_kernel(op, device.upper()):
        yield Check(op, FAIL if device == "cpu" or op in KERNELS else NONE, reason=registry.why_no_kernel(device, op))
        return
    try:
        cases = op_cases.cases(op)
    except Exception as error:  # noqa: BLE001 (the report names it)
        yield Check(op, FAIL, reason=f"its cases cannot be made: {one_line(error)}")
        return
    for kernel in sorted({case.kernel for case in cases}):
        yield of_kernel(kernel, cases, device, tell) if device == "cpu" else in_a_process(op, kernel, device, tell)


def of_kernel(kernel: str, cases: list[op_cases.Case], device: str, tell: Callable[[str], None]) -> Check:
    """Run those of ``cases`` that belong to a kernel."""
    outcome = op_checks.run([case for case in cases if case.kernel == kernel], device=device, tell=tell)
    return Check(kernel, FAIL if outcome.faults else PASS, outcome)


def in_a_process(op: str, kernel: str, device: str, tell: Callable[[str], None]) -> Check:
    """Run ``of_kernel`` in another process; if that crashes, the failed check has its exit code and last message.

    Tried twice if the machine has no room for another process or its threads.
    """
    for again in (True, False):
        try:
            found = _in_a_process(op, kernel, device, tell)
        except OSError as error:
            found = Check(kernel, FAIL, reason=f"its process cannot be started: {one_line(error)}")
        if not any(reason in found.reason for reason in _NO_ROOM):
            return found
        if again:
            time.sleep(PAUSE)
    return replace(
        found,
        reason=f"not checked, since the machine has no room for another process; try again later ({found.reason})",
    )


def _in_a_process(op: str, kernel: str, device: str, tell: Callable[[str], None]) -> Check:
    running = ""
    with tempfile.TemporaryFile() as errors:
        # Run in klfast's own folder, where Python looks for modules first: a klfast elsewhere may be another version.
        folder = Path(klfast.__file__).parent.parent
        with subprocess.Popen(
            command(op, kernel, device), cwd=folder, stdout=subprocess.PIPE, stderr=errors
        ) as process:
            for message in _messages(process):
                if "check" in message:
                    return _parsed(message["check"])
                running = message["now"]
                tell(running)
        errors.seek(0)
        said = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    what = f"its process ended with exit code {process.returncode}" + (f" in the case of {running}" if running else "")
    return Check(kernel, FAIL, reason=shortened(f"{what}: {said[-1].strip() if said else 'it said nothing'}"))


def _parsed(check: dict[str, Any]) -> Check:
    """Return a Check from its JSON."""
    outcome = check["outcome"]
    return Check(**check | {"outcome": op_checks.Outcome(**outcome | {"faults": tuple(outcome["faults"])})})


def command(op: str, kernel: str, device: str) -> list[str]:
    """Return the command line of the process that checks a kernel."""
    return [sys.executable, "-m", "klfast.diagnostics.kernel_checks", device, op, kernel]


def _messages(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the messages of a process; kill it if it writes nothing for PATIENCE seconds."""
    assert process.stdout is not None
    rest = b""
    while select.select([process.stdout], [], [], PATIENCE)[0]:
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):  # modules may write other lines when they are imported
                yield json.loads(line)
    process.kill()


def main(device: str, op: str, kernel: str) -> None:
    """Check a kernel and write the messages to standard output."""
    with _own_output() as out:

        def write(**message: object) -> None:
            print(json.dumps(message), file=out, flush=True)

        write(check=asdict(of_kernel(kernel, op_cases.cases(op), device, lambda case: write(now=case))))


def _own_output() -> TextIO:
    """Reserve standard output for this module: output of compilers and drivers goes to standard error."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


if __name__ == "__main__":
    main(*sys.argv[1:])
