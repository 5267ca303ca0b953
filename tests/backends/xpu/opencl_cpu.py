"""Launches on Intel's OpenCL CPU runtime: the SPIR-V made for the GPU, on tensors in the CPU's memory.

The matrix instructions, which the CPU lacks, come from builtins.cl. Pointers go to the kernel unchanged (shared virtual
memory), so that operands may overlap and have any strides, as on the GPU.
"""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import numpy
import pyopencl as cl
import torch
from klfast.kernels.launch import Launch
from triton_aot import is_compiled_in

from xpu.lunar_lake import compile_for_lunar_lake
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
        self._builtins = cl.Program(self._context, (Path(__file__).parent / "builtins.cl").read_text())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about programs that are not cached
            self._builtins.compile(options=["-cl-std=CL3.0"])
        self._linked: dict[bytes, cl.Kernel] = {}
        self.ran: dict[bytes, str] = {}

    def run(self, launch: Launch) -> None:
        if not all(launch.grid):
            return
        compiled = compile_for_lunar_lake(launch)
        if compiled.spirv not in self._linked:
            program = cl.Program(self._context, for_cpu(compiled.spirv))
            program.compile()
            self._linked[compiled.spirv] = cl.Kernel(
                cl.link_program(self._context, [program, self._builtins] if compiled.dpas else [program]), compiled.name
            )
        kernel = self._linked[compiled.spirv]
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


def _argument(value):
    if isinstance(value, torch.Tensor):
        assert value.data_ptr() % 16 == 0, "compiled for aligned pointers"
        memory = (ctypes.c_uint8 * max(value.untyped_storage().nbytes(), 1)).from_address(value.data_ptr())
        return cl.SVM(numpy.ctypeslib.as_array(memory))
    if isinstance(value, float):
        return numpy.float32(value)
    return numpy.int32(value) if -(2**31) <= value < 2**31 else numpy.int64(value)
