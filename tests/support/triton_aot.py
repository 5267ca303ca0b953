"""Compilation of klfast.kernels' launches for a GPU that is not present, and inspection of the result."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from klfast.kernels.launch import FUSED
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from klfast.core.io import write_atomic

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
HOPPER = GPUTarget("cuda", 90, 32)


def is_compiled_in(param, value) -> bool:
    """Return the constants: constexprs, None and, where integers are specialized, ones."""
    return param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize)


def source(launch) -> ASTSource:
    """Return the source of a launch, specialized as at a call: aligned pointers, multiples of 16, ones."""
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = launch.args[param.name]
        if is_compiled_in(param, value):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name], aligned = TYPES[value.dtype], True
        elif isinstance(value, float):
            signature[param.name], aligned = "fp32", False
        else:
            signature[param.name], aligned = (
                "i32" if -(2**31) <= value < 2**31 else "i64",
                value % 16 == 0 and not param.do_not_specialize,
            )
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


@dataclass(frozen=True)
class Compiled:
    """Registers per thread, bytes of stack (spills) and of shared memory, and the count of each instruction."""

    registers: int
    stack: int
    shared: int
    opcodes: Counter

    def count(self, *prefixes: str) -> int:
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefixes))


def compile_for_hopper(launch) -> Compiled:
    compiled = triton.compile(source(launch), target=HOPPER, options=launch.options | FUSED)
    usage = _told(compiled.asm["cubin"], "cuobjdump", "-res-usage")
    listing = _told(compiled.asm["cubin"], "nvdisasm", "-c")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE))
    return Compiled(registers, stack, compiled.metadata.shared, opcodes)


def _told(cubin: bytes, tool: str, option: str) -> str:
    """Return what NVIDIA's tool says of a cubin; kept in Triton's cache, since it takes half a second to start."""
    kept = Path(os.environ["TRITON_CACHE_DIR"], f"{tool}-{hashlib.sha256(cubin).hexdigest()}")
    if not kept.exists():
        command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool, option]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
        write_atomic(kept, done.stdout)
    return kept.read_text()
