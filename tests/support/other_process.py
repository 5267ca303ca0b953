"""Python code run in a process of its own: where a fault would end the test's, or where it forks."""

import os
import subprocess
import sys
import textwrap


def run(code: str, timeout: float = 600, **environment: str) -> str:
    """Standard output of the code; AssertionError, with standard error, unless it ends well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "passive", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout
