"""Launches on Intel's OpenCL CPU runtime: the SPIR-V made for the GPU, on tensors in the CPU's memory.

The matrix instructions, which the CPU lacks, come from builtins.cl. Pointers go to the kernel unchanged (shared virtual
memory), so that operands may overlap and have any strides, as on the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import warnings
from pathlib import Path

import numpy
import pyopencl as cl
import torch
from klfast.kernels.launch import Launch
from triton_aot import is_compiled_in

from xpu.lunar_lake import Compiled, compile_for_lunar_lake
from xpu.spirv import for_cpu


class OpenCLCPU:
    """The runtime; ``run`` replaces Launch.run.

    Attributes:
        ran: the SPIR-V modules that were run, with the names of their kernels.
    """

    def __init__(self):
        devices = [
            device
            for platform in cl.get_platforms()
            if "Intel" in platform.vendor
            for device in platform.get_devices(cl.device_type.CPU)
        ]
        if not devices:
            raise RuntimeError(
                "no Intel OpenCL CPU device; is intel-opencl-rt installed, and does OCL_ICD_VENDORS name its "
                "libintelocl.so?"
            )
        self.device = devices[0]
        self._context = cl.Context([self.device])
        self._queue = cl.CommandQueue(self._context)
        self._source = (Path(__file__).parent / "builtins.cl").read_text()
        self._kernels: dict[bytes, cl.Kernel] = {}
        self.ran: dict[bytes, str] = {}

    def run(self, launch: Launch) -> None:
        if not all(launch.grid):
            return
        compiled = compile_for_lunar_lake(launch)
        if compiled.spirv not in self._kernels:
            self._kernels[compiled.spirv] = cl.Kernel(self._program(compiled), compiled.name)
        kernel = self._kernels[compiled.spirv]
        args = [
            _argument(launch.args[p.name]) for p in launch.kernel.params if not is_compiled_in(p, launch.args[p.name])
        ]
        if kernel.num_args > len(args):
            args.append(cl.LocalMemory(max(compiled.shared, 1)))
        kernel.set_args(*args)
        grid = (*launch.grid, 1, 1)[:3]
        cl.enqueue_nd_range_kernel(
            self._queue, kernel, (grid[0] * compiled.threads, *grid[1:]), (compiled.threads, 1, 1)
        ).wait()
        self.ran[compiled.spirv] = compiled.name

    def _program(self, compiled: Compiled) -> cl.Program:
        """Return what the runtime made of a module, kept beside Triton's own cache: compiling takes it seconds."""
        spirv, source = for_cpu(compiled.spirv), self._source if compiled.dpas else ""
        options = os.environ["CL_CONFIG_LLVM_OPTIONS"]
        made_of = repr((self.device.name, self.device.driver_version, options, source, spirv))
        kept = Path(os.environ["TRITON_CACHE_DIR"], "opencl", hashlib.sha256(made_of.encode()).hexdigest())
        if kept.is_file():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a log that says nothing
                return cl.Program(self._context, [self.device], [kept.read_bytes()]).build()
        programs = [cl.Program(self._context, spirv)]
        programs[0].compile()
        if compiled.dpas:
            programs.append(self._builtins)
        linked = cl.link_program(self._context, programs)
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")
        new.write_bytes(linked.get_info(cl.program_info.BINARIES)[0])
        new.replace(kept)
        return linked

    @functools.cached_property
    def _builtins(self) -> cl.Program:
        program = cl.Program(self._context, self._source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about programs that are not cached
            program.compile(options=["-cl-std=CL3.0"])
        return program


def _argument(value):
    if isinstance(value, torch.Tensor):
        assert value.data_ptr() % 16 == 0, "compiled for aligned pointers"
        memory = (ctypes.c_uint8 * max(value.untyped_storage().nbytes(), 1)).from_address(value.data_ptr())
        return cl.SVM(numpy.ctypeslib.as_array(memory))
    if isinstance(value, float):
        return numpy.float32(value)
    return numpy.int32(value) if -(2**31) <= value < 2**31 else numpy.int64(value)
