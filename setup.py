"""Build of the C++ extension klfast._C.

It does not link torch, so one binary serves every torch version. Each ISA tier's translation units (named after the
tier) have their own flags; the rest is compiled for the architecture's baseline, so that a wheel runs anywhere.
"""

import math
import os
import platform
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
from setuptools.command.build_ext import build_ext

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512_VNNI = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vnni",
    "-mprefer-vector-width=512",
]
TIER_FLAGS = {  # file name without suffix -> flags
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512vnni": AVX512_VNNI,
    "avx512bf16": [*AVX512_VNNI, "-mavx512bf16"],
    "amx": [*AVX512_VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
# For tests on a machine with AVX-512-VNNI but not AVX-VNNI: the tier with the same instructions in AVX-512's encoding.
AVXVNNI_TWIN = os.environ.get("KLFAST_AVXVNNI_TWIN") == "1"
if AVXVNNI_TWIN:
    TIER_FLAGS["avxvnni"] = [*AVX2, "-mavx512vl", "-mavx512vnni"]
# Likewise with AVX-512-BF16 but not AMX: a model's tiles (csrc/simd/amx_model.h) replace the tile registers.
AMX_TWIN = os.environ.get("KLFAST_AMX_TWIN") == "1"
if AMX_TWIN:
    TIER_FLAGS["amx"] = TIER_FLAGS["avx512bf16"]
# An instruction of each extension in a tier. An assembler older than the compiler (they are separate packages) accepts
# the flags, but fails at one of these.
AVX2_PROBE = [
    "vpabsd %ymm0, %ymm1",
    "vfmadd231ps %ymm0, %ymm1, %ymm2",
    "vcvtph2ps %xmm0, %ymm1",
    "pextl %eax, %ebx, %ecx",
]
AVX512_VNNI_PROBE = [
    *AVX2_PROBE,
    "vpabsd %zmm0, %zmm1",
    "vpabsb %zmm0, %zmm1",
    "vpmullq %zmm0, %zmm1, %zmm2",
    "vpabsd %ymm0, %ymm1{%k1}",
    "vpdpbusd %zmm0, %zmm1, %zmm2",
]
AVX512_BF16_PROBE = [*AVX512_VNNI_PROBE, "vdpbf16ps %zmm0, %zmm1, %zmm2"]
TIER_PROBES = {
    "avx2": AVX2_PROBE,
    "avxvnni": [
        *AVX2_PROBE,
        "vpdpbusd %ymm0, %ymm1, %ymm2{%k1}" if AVXVNNI_TWIN else "{vex} vpdpbusd %ymm0, %ymm1, %ymm2",
    ],
    "avx512vnni": AVX512_VNNI_PROBE,
    "avx512bf16": AVX512_BF16_PROBE,
    "amx": AVX512_BF16_PROBE
    if AMX_TWIN
    else [*AVX512_BF16_PROBE, "tilezero %tmm0", "tdpbf16ps %tmm0, %tmm1, %tmm2", "tdpbssd %tmm0, %tmm1, %tmm2"],
}
# -ffp-contract=off: scalar and vector tiers round alike unless they use an explicit FMA.
# -fno-tree-loop-distribute-patterns: keeps loops that zero a tile, since `rep stos` takes longer than small matmuls.
COMMON_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-tree-loop-distribute-patterns",
    "-Wall",
    "-Wextra",
]


class BuildPerTier(build_ext):
    """Compiles every source with the flags of its tier, without tiers that the compiler or assembler cannot build."""

    def build_extension(self, ext):
        self._check_tools()
        tiers = self._tiers()
        macros = [(f"KLFAST_BUILT_{t.upper()}", "1") for t in tiers]
        if AVXVNNI_TWIN:
            macros.append(("KLFAST_AVXVNNI_TWIN", "1"))
        if AMX_TWIN:
            macros.append(("KLFAST_AMX_TWIN", "1"))
        sources = [s for s in ext.sources if Path(s).stem in tiers or Path(s).stem not in TIER_FLAGS]
        extra = os.environ.get("KLFAST_CXXFLAGS", "").split()
        compiler = [
            *self.compiler.compiler_so_cxx,
            subprocess.check_output([*self.compiler.compiler_so_cxx, "--version"], text=True),
        ]

        def compile_one(source):
            flags = [*COMMON_FLAGS, *TIER_FLAGS.get(Path(source).stem, []), *extra]
            [built] = self.compiler.object_filenames([source], output_dir=self.build_temp)
            record = Path(f"{built}.command")
            command = repr(
                [compiler, self.compiler.include_dirs, self.compiler.macros, macros, ext.include_dirs, flags]
            )
            if not self.force and is_current(Path(built), record, command):
                return built
            record.unlink(missing_ok=True)
            started = time.time_ns()
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*flags, "-MMD", "-MF", f"{built}.d"],
                depends=ext.depends,
            )
            os.utime(built, ns=(started, started))  # so that sources edited meanwhile are newer
            record.write_text(command)
            return built

        with ThreadPoolExecutor(jobs()) as pool:
            objects = list(pool.map(compile_one, sources))
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(str(Path(target).parent))
        self.compiler.link_shared_object(objects, target, extra_postargs=["-fopenmp", *extra], target_lang="c++")

    def _tiers(self):
        is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
        if not is_x86:
            return []
        return [tier for tier, flags in TIER_FLAGS.items() if self._compiles(flags, TIER_PROBES[tier])]

    def _check_tools(self):
        """Report missing tools in one line, before the compiler does in many."""
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise SystemExit(
                f"klfast: the C headers of Python {version} (Python.h) are missing; "
                f"install them (Debian, Ubuntu: apt install python{version}-dev) and try again"
            )
        if not shutil.which(compiler := self.compiler.compiler_so_cxx[0]):
            raise SystemExit(
                f"klfast: there is no C++ compiler ({compiler}); "
                "install one (Debian, Ubuntu: apt install g++) and try again"
            )

    def _compiles(self, flags, instructions):
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            lines = "".join(f'    asm volatile("{line}");\n' for line in instructions)
            probe.write_text(f"void probe() {{\n{lines}}}\n")
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=flags)
            except Exception as error:  # noqa: BLE001 (the exception classes differ by setuptools version)
                print(f"klfast: the compiler or its assembler cannot build a tier ({' '.join(flags)}): {error}")
                return False
        return True


def is_current(built, record, command):
    """Return True if an object was made by this command and is newer than all inputs in its .d file."""
    try:
        if record.read_text() != command:
            return False
        inputs = Path(f"{built}.d").read_text().split(": ", 1)[1].replace("\\\n", " ").split()
        time_built = built.stat().st_mtime_ns
        return all(os.stat(path).st_mtime_ns < time_built for path in inputs)
    except (OSError, IndexError):  # including paths with a space, which this does not parse
        return False


def jobs():
    """Return how many sources to compile at a time: MAX_JOBS, or the number of CPUs available to this process."""
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
    """Return the number of CPUs that the control groups (v2) of this process allow; infinity if there is no limit."""
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
            pass  # "max", or the file does not exist
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
            depends=files("*.h"),
            include_dirs=["csrc", pybind11.get_include()],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildPerTier},
)
