"""The checks of ``klfast doctor --device``. On a GPU those of each kernel run in a process of their own: after an illegal
access, or where a driver ends the process, the other kernels would only repeat the error.

``python -m klfast.diagnostics.kernel_checks DEVICE OP KERNEL`` is such a process; it writes lines of JSON.
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
from typing import TextIO

import klfast
from klfast.benchkit import op_cases
from klfast.core.errors import one_line, shortened
from klfast.diagnostics import op_checks
from klfast.dispatch import registry

PASS, FAIL, NONE = "pass", "FAIL", "none"  # NONE: klfast has no kernel for such devices, its plain reference runs
PATIENCE = 900.0  # seconds in which a process has to begin another case; compiling one takes less
PAUSE = 2.0  # seconds before a process that the machine had no room for is tried again
_NO_ROOM = tuple(map(os.strerror, (errno.EAGAIN, errno.ENOMEM)))  # for processes and threads, or their memory
_MOST_FAULTS = 12  # that are listed for a kernel


@dataclass(frozen=True)
class Check:
    """A kernel on the device: PASS, FAIL or NONE; ``outcome`` where cases were run, else a ``reason``."""

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
    """Of each of an op's kernels, as torch dispatches the op to the device. ``tell`` gets the name of each case before it runs."""
    from klfast.backends.triton import KERNELS

    if not registry.has_kernel(op, device.upper()):
        yield Check(op, FAIL if device == "cpu" or op in KERNELS else NONE, reason=registry.why_no_kernel(device, op))
        return
    try:
        cases = op_cases.cases(op)
    except Exception as error:
        yield Check(op, FAIL, reason=f"its cases cannot be made: {one_line(error)}")
        return
    for kernel in sorted({case.kernel for case in cases}):
        yield of_kernel(kernel, cases, device, tell) if device == "cpu" else in_a_process(op, kernel, device, tell)


def of_kernel(kernel: str, cases: list[op_cases.Case], device: str, tell: Callable[[str], None]) -> Check:
    """Run a kernel's cases, some of ``cases``."""
    outcome = op_checks.run([case for case in cases if case.kernel == kernel], device=device, tell=tell)
    return Check(kernel, FAIL if outcome.faults else PASS, outcome)


def in_a_process(op: str, kernel: str, device: str, tell: Callable[[str], None]) -> Check:
    """``of_kernel`` with an op's cases in another process; if that ends early, a failed check with its exit code and the last it said.

    Where the machine has no room for a process or its threads for a moment, it is tried a second time.
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
        # From klfast's own folder: Python looks for modules there first, and a klfast elsewhere may be another.
        folder = Path(klfast.__file__).parent.parent
        with subprocess.Popen(
            _command(op, kernel, device), cwd=folder, stdout=subprocess.PIPE, stderr=errors
        ) as process:
            for message in _messages(process):
                if "check" in message:
                    found = message["check"]
                    return Check(
                        **found
                        | {
                            "outcome": op_checks.Outcome(
                                **found["outcome"] | {"faults": tuple(found["outcome"]["faults"])}
                            )
                        }
                    )
                running = message["now"]
                tell(running)
        errors.seek(0)
        said = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    what = f"its process ended with exit code {process.returncode}" + (f" in the case of {running}" if running else "")
    return Check(kernel, FAIL, reason=shortened(f"{what}: {said[-1].strip() if said else 'it said nothing'}"))


def _command(op: str, kernel: str, device: str) -> list[str]:
    return [sys.executable, "-m", "klfast.diagnostics.kernel_checks", device, op, kernel]


def _messages(process: subprocess.Popen) -> Iterator[dict]:
    """What a process writes; it is ended if it writes nothing for PATIENCE seconds."""
    rest = b""
    while select.select([process.stdout], [], [], PATIENCE)[0]:
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):  # what else comes was written while modules were imported
                yield json.loads(line)
    process.kill()


def main(device: str, op: str, kernel: str) -> None:
    with _own_output() as out:

        def write(**message: object) -> None:
            print(json.dumps(message), file=out, flush=True)

        write(check=asdict(of_kernel(kernel, op_cases.cases(op), device, lambda case: write(now=case))))


def _own_output() -> TextIO:
    """Standard output for this module alone: what compilers and drivers write there goes to standard error."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


if __name__ == "__main__":
    main(*sys.argv[1:])
