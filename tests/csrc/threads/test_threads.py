"""Concurrent calls of the kernels and of the engine's programs, under ThreadSanitizer."""

import shutil
import subprocess

import csrc_program
import pytest

pytestmark = pytest.mark.skipif(
    not (csrc_program.ROOT / "setup.py").is_file() or shutil.which("g++") is None, reason="needs a source tree and g++"
)


@pytest.mark.slow
def test_no_races():
    """At the tiers scalar and AVX2; the others' code differs in its instructions."""
    built = csrc_program.build(
        "races",
        "tests/csrc/check*.cpp",
        "tests/csrc/threads/*.cpp",
        flags="-O1 -g1 -fsanitize=thread",
        tiers=("scalar", "avx2"),
        openmp=False,
        folder="build/threads",
    )
    done = subprocess.run([built["program"]], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[:10000]
