"""Build of the C++ extension klfast._C.

It does not link torch, so one binary serves every torch version. The code of an ISA tier is compiled with the flags of
the features that csrc/core/tiers.def says it needs; all else for the architecture's baseline, so that a wheel runs
anywhere.
"""

import functools
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Feature of an x86-64 CPU, as csrc/core/tiers.def names it -> compiler flags, and instructions for the assembler: one
# older than the compiler (they come in packages of their own) takes the flags, and stops at these.
FEATURES = {
    "avx": ([], []),
    "fma": (["-mfma"], ["vfmadd231ps %ymm0, %ymm1, %ymm2"]),
    "f16c": (["-mf16c"], ["vcvtph2ps %xmm0, %ymm1"]),
    "avx2": (["-mavx2"], ["vpabsd %ymm0, %ymm1"]),
    "bmi2": (["-mbmi2"], ["pextl %eax, %ebx, %ecx"]),
    "avx_vnni": (["-mavxvnni"], ["{vex} vpdpbusd %ymm0, %ymm1, %ymm2"]),
    "avx512f": (["-mavx512f", "-mprefer-vector-width=512"], ["vpabsd %zmm0, %zmm1"]),
    "avx512dq": (["-mavx512dq"], ["vpmullq %zmm0, %zmm1, %zmm2"]),
    "avx512bw": (["-mavx512bw"], ["vpabsb %zmm0, %zmm1"]),
    "avx512vl": (["-mavx512vl"], ["vpabsd %ymm0, %ymm1{%k1}"]),
    "avx512_vnni": (["-mavx512vnni"], ["vpdpbusd %zmm0, %zmm1, %zmm2"]),
    "avx512_bf16": (["-mavx512bf16"], ["vdpbf16ps %zmm0, %zmm1, %zmm2"]),
    "amx_tile": (["-mamx-tile"], ["tilezero %tmm0"]),
    "amx_int8": (["-mamx-int8"], ["tdpbssd %tmm0, %tmm1, %tmm2"]),
    "amx_bf16": (["-mamx-bf16"], ["tdpbf16ps %tmm0, %tmm1, %tmm2"]),
}
TWINS = [name for name in ("KLFAST_AVXVNNI_TWIN", "KLFAST_AMX_TWIN") if os.environ.get(name) == "1"]
RUNS_WITH = {feature: (feature,) for feature in FEATURES}  # what a machine must have for it, by /proc/cpuinfo's names
# For tests on a machine with AVX-512-VNNI but not AVX-VNNI: that tier with the same instructions in AVX-512's encoding.
if "KLFAST_AVXVNNI_TWIN" in TWINS:
    FEATURES["avx_vnni"] = (["-mavx512vl", "-mavx512vnni"], ["vpdpbusd %ymm0, %ymm1, %ymm2{%k1}"])
    RUNS_WITH["avx_vnni"] = ("avx512vl", "avx512_vnni")
# Likewise where AVX-512-BF16 is there but not AMX: a model of the tiles (csrc/simd/amx_model.h) takes their place.
if "KLFAST_AMX_TWIN" in TWINS:
    FEATURES |= dict.fromkeys(("amx_tile", "amx_int8", "amx_bf16"), ([], []))
    RUNS_WITH |= dict.fromkeys(("amx_tile", "amx_int8", "amx_bf16"), ())
# For the compiler and for the linker. Apple's clang has the pragmas but no runtime: that of Homebrew's libomp.
OPENMP = (["-Xpreprocessor", "-fopenmp"], ["-lomp"]) if sys.platform == "darwin" else (["-fopenmp"], ["-fopenmp"])
# -ffp-contract=off: a scalar tier and its vector twins round alike unless they ask for an FMA.
# -fno-tree-loop-distribute-patterns: keeps loops that zero a tile, since `rep stos` takes longer than small products.
GCC_ONLY = "-fno-tree-loop-distribute-patterns"  # clang ends at flags that it does not know
COMMON_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    *OPENMP[0],
    "-fvisibility=hidden",
    "-ffp-contract=off",
    GCC_ONLY,
    "-Wall",
    "-Wextra",
]


class BuildPerTier(build_ext):
    """Compile every source with the flags of its tiers; leave out tiers that compiler or assembler cannot build."""

    def finalize_options(self):
        super().finalize_options()
        if self.editable_mode:  # by default a new folder each time, in which there is nothing that could be current
            anew = build(self.distribution)  # its folder is that of other builds; free-threaded Python has its own
            anew.ensure_finalized()
            self.build_temp = anew.build_temp

    def build_extension(self, ext):
        self._check_tools()
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(str(Path(target).parent))
        flags = [*OPENMP[1], *extra_flags()]
        self.compiler.link_shared_object(self.build_objects(ext), target, extra_postargs=flags, target_lang="c++")

    def build_objects(self, ext):
        """Compile what is not current of an extension's sources; returns all of its objects."""
        built = self.built_tiers()
        names = ",".join(built)
        macros = [("KLFAST_BUILT", names), *((twin, "1") for twin in TWINS)]
        compiler = [
            *self.compiler.compiler_so_cxx,
            subprocess.check_output([*self.compiler.compiler_so_cxx, "--version"], text=True),
        ]
        needs = tiers()
        common = [flag for flag in COMMON_FLAGS if flag != GCC_ONLY or self._error([flag]) is None]

        def compile_one(unit):
            source, tier = unit
            own = [] if tier is None else [("KLFAST_TIER", tier)]
            folder = self.build_temp if tier is None else str(Path(self.build_temp, tier))
            flags = [*common, *(() if tier is None else flags_of(needs[tier])), *extra_flags()]
            [object_file] = self.compiler.object_filenames([source], output_dir=folder)
            record = Path(f"{object_file}.command")
            command = repr(
                [compiler, self.compiler.include_dirs, self.compiler.macros, macros, own, ext.include_dirs, flags]
            )
            if not self.force and is_current(Path(object_file), record, command):
                return object_file
            record.unlink(missing_ok=True)
            started = time.time_ns()
            self.compiler.compile(
                [source],
                output_dir=folder,
                macros=[*macros, *own],
                include_dirs=ext.include_dirs,
                extra_postargs=[*flags, "-MMD", "-MF", f"{object_file}.d"],
                depends=ext.depends,
            )
            os.utime(object_file, ns=(started, started))  # so that what is edited meanwhile is newer
            record.write_text(command)
            return object_file

        units = [(source, tier) for source in ext.sources for tier in tiers_of(source) if tier is None or tier in built]
        with ThreadPoolExecutor(jobs()) as pool:
            return list(pool.map(compile_one, units))

    def built_tiers(self):
        known = FEATURES if re.search("x86_64|amd64", self.plat_name) else {}  # wheels may be cross-built
        if os.environ.get("KLFAST_TIERS_HERE") == "1":  # leave out what cannot run here
            here = Path("/proc/cpuinfo").read_text().split()
            known = [feature for feature in known if all(flag in here for flag in RUNS_WITH[feature])]
        found = {name: needs for name, needs in tiers().items() if set(needs) <= set(known)}
        return [name for name, needs in found.items() if not needs or self._builds(flags_of(needs), probes_of(needs))]

    def _check_tools(self):
        """Say what is missing in one line, before the compiler says it in many."""
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise SystemExit(
                f"klfast: the C headers of Python {version} (Python.h) are missing; install them (Debian, Ubuntu: "
                f"apt install python{version}-dev) and try again"
            )
        if not shutil.which(compiler := self.compiler.compiler_so_cxx[0]):
            raise SystemExit(
                f"klfast: there is no C++ compiler ({compiler}); install one (Debian, Ubuntu: apt install g++) and try "
                "again"
            )

    def _builds(self, flags, instructions):
        """Return whether compiler and assembler build a tier; if not, say so."""
        error = self._error(flags, instructions)
        if error is not None:
            print(f"klfast: the compiler or its assembler cannot build a tier ({' '.join(flags)}): {error}")
        return error is None

    def _error(self, flags, instructions=()):
        """Return what goes wrong in compiling some instructions with these flags; None if nothing does."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            lines = "".join(f'    asm volatile("{line}");\n' for line in instructions)
            probe.write_text(f"void probe() {{\n{lines}}}\n")
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=flags)
            except Exception as error:  # noqa: BLE001 (compilers' exception classes differ by setuptools version)
                return error
        return None


def extra_flags():
    return os.environ.get("KLFAST_CXXFLAGS", "").split()


@functools.cache
def tiers():
    """Every tier of csrc/core/tiers.def, in its order -> what it needs."""
    text = re.sub(r"//.*", "", (ROOT / "csrc/core/tiers.def").read_text())
    found = re.findall(r"^TIER\((\w+),\s*FALLS_BACK_TO\([^)]*\),\s*NEEDS\(([^)]*)\)\)", text, re.MULTILINE)
    return {name: re.findall(r"\w+", needs) for name, needs in found}


def flags_of(needs):
    return [flag for need in needs for flag in FEATURES[need][0]]


def probes_of(needs):
    return [instruction for need in needs for instruction in FEATURES[need][1]]


def tiers_of(source):
    """Return the tiers that a source is compiled for, each on its own; None stands for the baseline.

    A file named after a tier belongs to that one. A file that defines KLFAST_TIERS is compiled for those of them that
    have no file of their own beside it, and for the baseline.
    """
    path = Path(source)
    if path.stem in tiers():
        return [path.stem]
    names = re.search(r"^#define KLFAST_TIERS (.+)$", path.read_text(), re.MULTILINE)
    own = [] if names is None else re.findall(r"\w+", names[1])
    if unknown := set(own) - set(tiers()):
        raise SystemExit(f"klfast: {source}: csrc/core/tiers.def has no tier {', '.join(sorted(unknown))}")
    return [None, *(tier for tier in own if not path.with_name(f"{tier}.cpp").exists())]


def is_current(built, record, command):
    """Whether an object was made by this command and is newer than all that went into it, as its .d file lists."""
    try:
        if record.read_text() != command:
            return False
        inputs = Path(f"{built}.d").read_text().split(": ", 1)[1].replace("\\\n", " ").split()
        time_built = built.stat().st_mtime_ns
        return all(os.stat(path).st_mtime_ns < time_built for path in inputs)
    except (OSError, IndexError):  # also a path with a space, which is not understood here
        return False


def jobs():
    """How many sources to compile at a time: MAX_JOBS, or as many as there are CPUs for this process."""
    if asked := os.environ.get("MAX_JOBS"):
        if not (asked.isdecimal() and int(asked)):
            raise SystemExit(f"klfast: MAX_JOBS must be a positive integer, got {asked!r}")
        return int(asked)
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        cpus = os.process_cpu_count()
    else:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.ceil(min(cpus or 1, cgroup_cpus())))


def cgroup_cpus(root="/sys/fs/cgroup", membership="/proc/self/cgroup"):
    """Return how many CPUs' worth of time the control groups (v2) of this process allow; infinity without a limit."""
    try:
        [path] = [line[3:] for line in Path(membership).read_text().splitlines() if line.startswith("0::")]
    except (OSError, ValueError):
        return math.inf
    allowed = math.inf
    group = Path(root, path.lstrip("/"))
    for folder in (group, *group.parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            allowed = min(allowed, int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            pass  # "max", or no such file
        if folder == Path(root):
            break
    return allowed


def files(*patterns):
    return sorted(str(path) for pattern in patterns for path in Path("csrc").rglob(pattern))


setup(
    ext_modules=[
        Extension(
            "klfast._C",
            sources=files("*.cpp"),
            depends=files("*.h", "*.def"),
            include_dirs=["csrc", pybind11.get_include()],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildPerTier},
)
