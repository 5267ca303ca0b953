"""Build of the C++ extension klfast._C.

It does not link torch, so one binary serves every torch version. Each ISA tier is one
translation unit (named after its tier) with flags of its own; all else is compiled for the
architecture's baseline, so that a wheel runs anywhere.
"""

import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512_VNNI = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
TIER_FLAGS = {  # file name without suffix -> flags
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512vnni": AVX512_VNNI,
    "avx512bf16": [*AVX512_VNNI, "-mavx512bf16"],
    "amx": [*AVX512_VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
# For tests on a machine with AVX-512-VNNI but not AVX-VNNI: that tier with the same instructions in AVX-512's encoding.
AVXVNNI_TWIN = os.environ.get("KLFAST_AVXVNNI_TWIN") == "1"
if AVXVNNI_TWIN:
    TIER_FLAGS["avxvnni"] = [*AVX2, "-mavx512vl", "-mavx512vnni"]
# Likewise where AVX-512-BF16 is there but not AMX: tiles of a model (csrc/vec/tiles_model.h) take the place of registers.
AMX_TWIN = os.environ.get("KLFAST_AMX_TWIN") == "1"
if AMX_TWIN:
    TIER_FLAGS["amx"] = TIER_FLAGS["avx512bf16"]
# -ffp-contract=off: a scalar tier and its vector twins round alike unless they ask for an FMA.
# -fno-tree-loop-distribute-patterns: a loop that sets a tile to zero stays one; `rep stos` takes longer than small products.
COMMON_FLAGS = [
    "-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-tree-loop-distribute-patterns", "-Wall", "-Wextra",
]  # fmt: skip


class BuildPerTier(build_ext):
    """Compile every source with the flags of its tier; leave out tiers the compiler cannot build."""

    def build_extension(self, ext):
        self._check_tools()
        tiers = [t for t in TIER_FLAGS if self._compiles(TIER_FLAGS[t])] if self._is_x86() else []
        macros = [(f"KLFAST_BUILT_{t.upper()}", "1") for t in tiers]
        if AVXVNNI_TWIN:
            macros.append(("KLFAST_AVXVNNI_TWIN", "1"))
        if AMX_TWIN:
            macros.append(("KLFAST_AMX_TWIN", "1"))
        sources = [s for s in ext.sources if Path(s).stem in tiers or Path(s).stem not in TIER_FLAGS]
        extra = os.environ.get("KLFAST_CXXFLAGS", "").split()

        def compile_one(source):
            flags = [*COMMON_FLAGS, *TIER_FLAGS.get(Path(source).stem, []), *extra]
            return self.compiler.compile(
                [source], output_dir=self.build_temp, macros=macros, include_dirs=ext.include_dirs,
                extra_postargs=flags, depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = sum(pool.map(compile_one, sources), [])
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(str(Path(target).parent))
        self.compiler.link_shared_object(objects, target, extra_postargs=["-fopenmp", *extra], target_lang="c++")

    def _check_tools(self):
        """Say what is missing in one line, before the compiler says it in many."""
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise SystemExit(
                f"klfast: the C headers of Python {version} (Python.h) are missing; install them (Debian, Ubuntu: apt install "
                f"python{version}-dev) and try again"
            )
        if not shutil.which(compiler := self.compiler.compiler_so_cxx[0]):
            raise SystemExit(f"klfast: there is no C++ compiler ({compiler}); install one (Debian, Ubuntu: apt install g++) and try again")

    @staticmethod
    def _is_x86():
        return platform.machine().lower() in ("x86_64", "amd64", "i686")

    def _compiles(self, flags):
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text("int main() { return 0; }\n")
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=flags)
            except Exception as error:  # the compilers' exception classes differ by setuptools version
                print(f"klfast: the compiler cannot build a tier ({' '.join(flags)}): {error}")
                return False
        return True


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
