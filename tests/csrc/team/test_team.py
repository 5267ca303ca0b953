"""The barriers of core/team.h under ThreadSanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file() or shutil.which("g++") is None, reason="needs a source tree and g++"
)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_races(tmp_path, sanitizer):
    program, sources = tmp_path / "races", [ROOT / "csrc/core/team.cpp", Path(__file__).with_name("team_races.cpp")]
    flags = ["-std=c++20", "-O1", "-g", "-fopenmp", f"-fsanitize={sanitizer}", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
