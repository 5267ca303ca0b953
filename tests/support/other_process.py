"""Python code in a separate process: for faults that would end the test's process, and for forks."""

import os
import subprocess
import sys
import textwrap


def run(code: str, timeout: float = 600, **environment: str) -> str:
    """Run the code and return its standard output; raise AssertionError, with standard error, if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "passive", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout
