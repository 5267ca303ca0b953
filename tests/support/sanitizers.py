"""The extension with AddressSanitizer and UndefinedBehaviorSanitizer: python tests/support/sanitizers.py TESTS...

Left out is what makes compiling much slower and finds little here: null pointers crash anyway, virtual calls there are
none, and AddressSanitizer knows the sizes of objects; and the tiers that this machine cannot run. By clang, where it
is, from the objects of the kernels' fuzzer (tests/fuzz/csrc), which need not be compiled again then.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import csrc_program

FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
CHECKS, LEFT_OUT = "address,undefined", "-fno-sanitize=null,vptr,object-size"
FUZZED = (  # inputs are shapes and choices, not texts to guess
    f"{FLAGS} -fsanitize=fuzzer,{CHECKS} {LEFT_OUT} -fno-sanitize-coverage=trace-cmp"
)
ENVIRONMENT = {"KLFAST_TIERS_HERE": "1", "KLFAST_AVXVNNI_TWIN": "1", "KLFAST_AMX_TWIN": "1"}
CLANG = {"CXX": "clang++"}
OBJECTS = "build/fuzz_kernels"  # the fuzzer's
QUIET = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "ASAN_OPTIONS": "detect_leaks=0"}
_PROBE = """
#include <omp.h>
extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return omp_in_parallel(); }
"""


def why_no_clang() -> str:
    """Return why clang cannot build the fuzzer here, in a sentence; empty if it can."""
    command = ["clang++", "-fsanitize=fuzzer,address", "-fopenmp", "-x", "c++", "-", "-o", os.devnull]
    try:
        can = subprocess.run(command, input=_PROBE, text=True, capture_output=True).returncode == 0
    except OSError:
        can = False
    packages = "apt install clang libclang-rt-dev libomp-dev"
    return "" if can else f"needs clang++ with libFuzzer and OpenMP (Debian: {packages})"


def build_extension() -> dict[str, str]:
    """Build it in build/sanitize; return the environment in which Python finds it."""
    if why_no_clang():
        environment = {"KLFAST_CXXFLAGS": f"{FLAGS} -fsanitize={CHECKS} {LEFT_OUT}"}
        objects, libraries = "build/sanitize/objects", [("g++", "libasan.so"), ("g++", "libubsan.so")]
    else:
        environment = CLANG | {"KLFAST_CXXFLAGS": FUZZED, "LDFLAGS": "-shared-libasan"}
        objects, libraries = OBJECTS, [("clang++", f"libclang_rt.asan-{os.uname().machine}.so")]
    folders = ["--build-temp", objects, "--build-lib", "build/sanitize/lib"]
    command = [sys.executable, "setup.py", "-q", "build", *folders]
    subprocess.run(command, cwd=csrc_program.ROOT, env=os.environ | ENVIRONMENT | environment, check=True)
    found = [
        subprocess.check_output([compiler, f"-print-file-name={library}"], text=True).strip()
        for compiler, library in libraries
    ]
    return QUIET | {"PYTHONPATH": str(csrc_program.ROOT / "build/sanitize/lib"), "LD_PRELOAD": " ".join(found)}


def main() -> int:
    """Build it, and run pytest with the command line's arguments; return its exit status."""
    pytest = Path(sys.executable).with_name("pytest")  # `python -m pytest` would find klfast in this folder first
    command = [str(pytest), *sys.argv[1:]]
    return subprocess.run(command, cwd=csrc_program.ROOT, env=os.environ | build_extension()).returncode


if __name__ == "__main__":
    sys.exit(main())
