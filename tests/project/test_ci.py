"""Skips and failures in CI."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "verify_xpu"
MAKE = """#!/bin/sh
echo "$1" >> {called}
[ "$1" = {fails} ] || exit 0
echo 'ERROR: Could not find a version'
echo 'ERROR: No matching distribution found for triton-xpu'
echo "make: *** [Makefile:64: $1] Error 1"
exit 2
"""


def run(tmp_path, fails):
    """Run the script in a folder where make only records its targets, and fails for one of them."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("bin/make", MAKE.format(called=tmp_path / "called", fails=fails)),
        (".ci/newer_ocloc", "#!/bin/sh\nexit 1\n"),
        ("bin/id", "#!/bin/sh\necho 1000\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(SCRIPT, tmp_path / ".ci")
    done = subprocess.run(
        [tmp_path / ".ci" / "verify_xpu"],
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout.splitlines(), (tmp_path / "called").read_text().split()


@pytest.mark.skipif(not SCRIPT.is_file(), reason="an sdist has no .ci")
@pytest.mark.parametrize(
    ("fails", "code", "asked"),
    [("none", 0, 3), ("build/xpu/.made", 2, 1), ("build/xpu/.triton", 0, 2), ("verify-xpu", 2, 3)],
)
def test_verify_xpu_is_skipped_only_if_triton_does_not_install(tmp_path, fails, code, asked):
    found, lines, called = run(tmp_path, fails)
    assert found == code and called == ["build/xpu/.made", "build/xpu/.triton", "verify-xpu"][:asked]
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    reason = "triton-xpu does not install here: ERROR: No matching distribution found for triton-xpu"
    assert skipped == [f"SKIPPED make verify-xpu: {reason}"] * (asked == 2)
