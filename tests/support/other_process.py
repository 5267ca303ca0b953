"""Python code in a separate process: for faults that would end the test's process, and for forks."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str, timeout: float = 600, **environment: str) -> str:
    """Run the code and return its standard output; raise AssertionError, with standard error, if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "passive", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


def run_tests(*tests: str, plugins: Iterable[str], **environment: str) -> None:
    """Run tests, named from the repository's root, with plugins of tests/support; raise AssertionError if one fails."""
    loaded = [word for plugin in plugins for word in ("-p", plugin)]
    files = [str(ROOT / test) for test in tests]
    command = [sys.executable, "-m", "pytest", *loaded, "-p", "no:cacheprovider", "-q", *files]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    # Not in the root, whose klfast would take the place of an installed one.
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
