"""SPIR-V modules as words, without the parts that Intel's CPU runtime does not know."""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER_WORDS = 5
OP_EXTENSION, OP_EXECUTION_MODE, OP_CAPABILITY = 10, 16, 17
# Both limit the threads of a program; results do not depend on them.
KERNEL_ATTRIBUTES, MAX_WORKGROUP_SIZE = 5892, 5893
ATTRIBUTES_EXTENSION = b"SPV_INTEL_kernel_attributes"


def instructions(words: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    at = HEADER_WORDS
    while at < len(words):
        length = words[at] >> 16
        yield words[at : at + length]
        at += length


def for_cpu(module: bytes) -> bytes:
    """Return the module without the capability SPV_INTEL_kernel_attributes."""
    words = struct.unpack(f"<{len(module) // 4}I", module)
    kept = list(words[:HEADER_WORDS])
    for instruction in instructions(words):
        kept += () if _is_attribute(instruction) else instruction
    return struct.pack(f"<{len(kept)}I", *kept)


def _is_attribute(instruction: tuple[int, ...]) -> bool:
    op = instruction[0] & 0xFFFF
    if op == OP_EXTENSION:
        return struct.pack(f"<{len(instruction) - 1}I", *instruction[1:]).rstrip(b"\0") == ATTRIBUTES_EXTENSION
    return (op == OP_CAPABILITY and instruction[1] == KERNEL_ATTRIBUTES) or (
        op == OP_EXECUTION_MODE and instruction[2] == MAX_WORKGROUP_SIZE
    )
