"""The build: what is compiled for which tiers, what an old assembler can build, how many jobs, what is built again."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from klfast.dispatch import pins

SETUP = Path(__file__).parents[2] / "setup.py"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(not SETUP.is_file() or COMPILER is None, reason="needs setup.py and g++")

# setup.py without its last call, and its command with a compiler as setuptools sets it up.
PRELUDE = """
import json, runpy, setuptools, sys
setuptools.setup = lambda **_: None
names = runpy.run_path({setup!r})
from setuptools import Distribution, Extension
try:
    from setuptools._distutils.ccompiler import new_compiler
    from setuptools._distutils.sysconfig import customize_compiler
except ImportError:
    from distutils.ccompiler import new_compiler
    from distutils.sysconfig import customize_compiler
command = names["BuildPerTier"](Distribution({{"name": "tiny"}}))
command.build_temp, command.build_lib = "temp", "lib"
command.ensure_finalized()
command.compiler = new_compiler()
customize_compiler(command.compiler)
"""


def python(code, folder, **environment):
    """Return what the code prints as JSON on its last line."""
    given = {name: value for name, value in os.environ.items() if name not in ("MAX_JOBS", "CXX", "CC")} | environment
    program = PRELUDE.format(setup=str(SETUP)) + code
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def old_assembler(folder, *unknown):
    """Make a g++ whose assembler lacks some instructions: GCC takes the flags, then its output cannot be assembled."""
    wrapper = folder / "old-g++"
    wrapper.write_text(
        f"""#!{sys.executable}
import re, subprocess, sys
arguments = sys.argv[1:]
if "-c" in arguments:
    kept = [a for i, a in enumerate(arguments) if a not in ("-c", "-o") and arguments[i - 1] != "-o"]
    text = subprocess.run([{COMPILER!r}, *kept, "-S", "-o", "-"], capture_output=True, text=True, check=True).stdout
    for name in {unknown!r}:
        if re.search(name, text):
            sys.exit(f"Error: no such instruction: {{name}}")
sys.exit(subprocess.run([{COMPILER!r}, *arguments]).returncode)
"""
    )
    wrapper.chmod(0o755)
    return str(wrapper)


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the tiers are x86's")
def test_an_assembler_older_than_the_compiler_leaves_tiers_out(tmp_path):
    def tiers(*unknown, **environment):
        compiler = old_assembler(tmp_path, *unknown)
        return python("print(json.dumps(command.built_tiers()))", tmp_path, CXX=compiler, CC=compiler, **environment)

    every = tiers()
    if every != python("print(json.dumps(list(names['tiers']())))", tmp_path):
        pytest.skip(f"this compiler builds only {every}")
    assert tiers("tdpbf16ps") == tiers("tilezero") == every[:5]
    assert tiers(r"\{vex\}") == [tier for tier in every if tier != "avxvnni"]
    assert tiers("vdpbf16ps") == every[:4]
    assert tiers("vpdpbusd") == every[:2] and tiers("zmm") == every[:3] and tiers("vfmadd") == every[:1]
    twins = {"KLFAST_AVXVNNI_TWIN": "1", "KLFAST_AMX_TWIN": "1"}
    assert tiers("tdpbf16ps", r"\{vex\}", **twins) == every


def test_the_tiers_are_those_of_the_machine_that_is_built_for(tmp_path):
    tiers = python("print(json.dumps(command.built_tiers()))", tmp_path, _PYTHON_HOST_PLATFORM="linux-aarch64")
    assert tiers == ["scalar"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="Linux tells what a CPU has")
def test_only_the_tiers_of_this_machine(tmp_path):
    def tiers(**environment):
        return python("print(json.dumps(command.built_tiers()))", tmp_path, **environment)

    here = tiers(KLFAST_TIERS_HERE="1")
    assert here == pins.available_tiers()
    twins = tiers(KLFAST_TIERS_HERE="1", KLFAST_AVXVNNI_TWIN="1", KLFAST_AMX_TWIN="1")
    assert ("avxvnni" in twins) == ("avx512vnni" in here) and ("amx" in twins) == ("avx512bf16" in here)


def test_a_source_that_an_old_assembler_cannot_build_is_left_out_of_the_extension(tmp_path):
    (tmp_path / "amx.cpp").write_text('void amx() { asm volatile("tdpbf16ps %tmm0, %tmm1, %tmm2"); }\n')
    (tmp_path / "module.cpp").write_text(
        "#include <initializer_list>\nconstexpr bool built() {\n"
        "  enum { scalar, avx2, avxvnni, avx512vnni, avx512bf16, amx };\n"
        "  for (int tier : {KLFAST_BUILT}) if (tier == amx) return true;\n  return false;\n}\n"
        "static_assert(!built());\n"
    )
    compiler = old_assembler(tmp_path, "tdpbf16ps")
    code = """
import glob
command.build_extension(Extension("tiny", ["module.cpp", "amx.cpp"]))
print(json.dumps(glob.glob("temp/**/*.o", recursive=True)))
"""
    assert python(code, tmp_path, CXX=compiler, CC=compiler) == ["temp/module.o"]


def test_compiler_flags_are_known_for_all_that_tiers_need(tmp_path):
    needs, known = python("print(json.dumps([names['tiers'](), list(names['FEATURES'])]))", tmp_path)
    assert {feature for features in needs.values() for feature in features} == set(known)


def test_a_source_that_names_tiers_is_compiled_once_for_each_of_them_and_once_without(tmp_path):
    (tmp_path / "tiers.cpp").write_text(
        "#define KLFAST_TIERS scalar, avx2, amx\n"
        "#ifdef KLFAST_TIER\nnamespace KLFAST_TIER { int kernel() { return 0; } }\n"
        "#else\nnamespace scalar { int kernel(); }\nint table() { return scalar::kernel(); }\n#endif\n"
    )
    (tmp_path / "amx.cpp").write_text("namespace amx { int kernel() { return 1; } }\n")
    code = """
import glob
command.build_extension(Extension("tiny", ["tiers.cpp", "amx.cpp"]))
print(json.dumps(sorted(glob.glob("temp/**/*.o", recursive=True))))
"""
    compiler = old_assembler(tmp_path, "vfmadd")
    both = ["temp/scalar/tiers.o", "temp/tiers.o"]
    assert python(code, tmp_path, CXX=compiler, CC=compiler) == both
    if os.uname().machine == "x86_64":
        assert set(python(code, tmp_path)) >= {"temp/avx2/tiers.o", *both}
        assert "temp/amx/tiers.o" not in python(code, tmp_path)
    (tmp_path / "tiers.cpp").write_text("#define KLFAST_TIERS scalar, sse\n")
    with pytest.raises(AssertionError, match=r"tiers\.cpp: csrc/core/tiers\.def has no tier sse"):
        python(code, tmp_path)


@pytest.mark.slow
def test_only_what_has_changed_is_compiled_again(tmp_path):
    (tmp_path / "a.cpp").write_text('#include "a.h"\nint a() { return A; }\n')
    (tmp_path / "b.cpp").write_text("int b() { return 2; }\n")
    (tmp_path / "a.h").write_text("#define A 1\n")
    code = """
import os
command.build_extension(Extension("tiny", ["a.cpp", "b.cpp"]))
print(json.dumps([os.stat(f"temp/{name}.o").st_mtime_ns for name in "ab"]))
"""

    def build(flags=""):
        return python(code, tmp_path, KLFAST_CXXFLAGS=flags)

    first = build()
    assert build() == first
    (tmp_path / "a.h").write_text("#define A 3\n")
    second = build()
    assert second[0] > first[0] and second[1] == first[1]
    third = build("-DOTHER=1")
    assert third[0] > second[0] and third[1] > second[1]
    (tmp_path / "temp" / "b.o.d").unlink()
    fourth = build("-DOTHER=1")
    assert fourth[0] == third[0] and fourth[1] > third[1]
    (tmp_path / "b.cpp").write_text("int b() { return }\n")
    with pytest.raises(AssertionError, match=r"b\.cpp"):
        build("-DOTHER=1")
    (tmp_path / "b.cpp").write_text("int b() { return 5; }\n")
    os.utime(tmp_path / "b.cpp", ns=(1, 1))  # older than the last object, which a failed build must not leave
    assert build("-DOTHER=1")[1] > fourth[1]


def test_editable_builds_have_the_folder_of_others_and_free_threaded_python_has_its_own(tmp_path):
    def folder(free_threaded, editable):
        code = """
import sysconfig
sysconfig.get_config_vars()["Py_GIL_DISABLED"] = {free_threaded}
command = names["BuildPerTier"](Distribution({{"name": "tiny"}}))
command.editable_mode = {editable}
command.ensure_finalized()
print(json.dumps(command.build_temp))"""
        return python(code.format(free_threaded=free_threaded, editable=editable), tmp_path)

    assert folder(0, True) == folder(0, False)
    assert folder(1, True) == folder(1, False) == folder(0, True) + "t"


def test_jobs(tmp_path):
    def jobs(**environment):
        return python("print(json.dumps(names['jobs']()))", tmp_path, **environment)

    assert jobs(MAX_JOBS="7") == 7
    with pytest.raises(AssertionError, match="MAX_JOBS must be a positive integer, got '0'"):
        jobs(MAX_JOBS="0")
    one = "import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\nprint(json.dumps(names['jobs']()))"
    assert python(one, tmp_path) == 1
    assert 1 <= jobs() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, math.inf),
        ({"": "max 100000"}, math.inf),
        ({"": "250000 100000"}, 2.5),
        ({"a": "400000 100000", "a/b": "max 100000", "": "300000 100000"}, 3.0),
        ({"a/b": "50000 100000", "a": "200000 100000"}, 0.5),
        ({"a": "0 0"}, math.inf),
    ],
)
def test_limits_of_control_groups(tmp_path, limits, expected):
    for folder, text in limits.items():
        (tmp_path / "root" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / folder / "cpu.max").write_text(f"{text}\n")
    (tmp_path / "cpu.max").write_text("1 100000")  # above the root: not looked at
    (tmp_path / "cgroup").write_text("12:cpu:/old\n0::/a/b\n")
    code = "print(json.dumps(names['cgroup_cpus']('root', 'cgroup')))"
    assert python(code, tmp_path) == expected
    (tmp_path / "cgroup").write_text("12:cpu:/old\n")  # version 1 alone
    assert python(code, tmp_path) == math.inf


def test_flags_that_only_gcc_knows_are_left_out_for_other_compilers(tmp_path):
    """Clang ends at an unknown -f flag; the wrapper does the same at this one."""
    other = tmp_path / "other-g++"
    refusal = 'case "$*" in *-fno-tree*) echo "error: unknown argument" >&2; exit 1;; esac'
    other.write_text(f'#!/bin/sh\n{refusal}\nexec {COMPILER} "$@"\n')
    other.chmod(0o755)
    source = tmp_path / "one.cpp"
    source.write_text("int one() { return 1; }\n")
    code = f"""
command.force = True
names["tiers"].cache_clear()
objects = command.build_objects(Extension("tiny", [{str(source)!r}]))
print(json.dumps(open(objects[0] + ".command").read()))
"""
    assert "-fno-tree" in python(code, tmp_path)
    text = python(code, tmp_path, CXX=str(other), CC=str(other))
    assert "-fno-tree" not in text and "-ffp-contract=off" in text
