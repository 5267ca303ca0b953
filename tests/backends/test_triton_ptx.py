"""The PTX that unpacks weights, run by a model of its six instructions: other tests of it need a GPU."""

import re

import numpy as np
import pytest
from klfast.kernels import dequant_common as common

BYTES = np.arange(256, dtype=np.uint64)
PACKED = (
    BYTES | (BYTES[::-1] << 8) | ((BYTES * 7 % 256) << 16) | ((BYTES * 29 % 256) << 24)
)  # uint32 [256], as the low half of uint64
COLUMNS = [(PACKED >> 8 * i) & 0xFF for i in range(4)]
TAKEN = {"LOW": lambda byte: byte & 15, "HIGH": lambda byte: byte >> 4, "WHOLE": lambda byte: byte}


def run(code: str, *operands: np.ndarray, results: int) -> list[np.ndarray]:
    """Return the result registers, uint32 [256], for operands numbered after them."""
    registers = {f"${results + i}": operand for i, operand in enumerate(operands)}
    for name, target, *sources in (
        re.split(r"[ ,]+", line.strip()) for line in code.strip("{} ").split(";")[1:] if line.strip()
    ):
        a, *rest = (registers[s] if s in registers else np.full(256, int(s, 0), dtype=np.uint64) for s in sources)
        if name == "prmt.b32":
            both = a | (rest[0] << 32)
            registers[target] = sum(((both >> (8 * ((rest[1] >> 4 * i) & 7))) & 0xFF) << 8 * i for i in range(4))
        else:
            compute = {
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
                "shr": np.right_shift,
                "sub": np.subtract,
                "mov": np.array,
            }
            registers[target] = compute[name.removesuffix(".b32").removesuffix(".u32")](a, *rest) & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(results)]


@pytest.mark.parametrize("take", TAKEN)
@pytest.mark.parametrize(("form", "constant"), [("F16", 0x6400), ("BF16", 0x4300), ("F32", 0x4B000000)])
def test_values_lie_below_the_constant(take, form, constant):
    if (take, form) == ("WHOLE", "BF16"):
        assert not hasattr(common, "WHOLE_BF16"), "a bfloat16 does not hold 128 + 255"
        return
    results = 4 if form == "F32" else 2
    found = run(getattr(common, f"{take}_{form}").value, PACKED, results=results)
    if form != "F32":  # two values per register, the first in its lower half
        found = [half for register in found for half in (register & 0xFFFF, register >> 16)]
    for value, column in zip(found, COLUMNS, strict=True):
        np.testing.assert_array_equal(value, TAKEN[take](column) | constant)


@pytest.mark.parametrize("take", ["LOW", "HIGH"])
@pytest.mark.parametrize("zero", range(16))
def test_int8_values_less_their_zero_point(take, zero):
    [found] = run(
        getattr(common, f"{take}_INT8").value, PACKED, np.full(256, zero * 0x01010101, dtype=np.uint64), results=1
    )
    for i, column in enumerate(COLUMNS):
        values = ((found >> 8 * i) & 0xFF).astype(np.uint8).view(np.int8)
        np.testing.assert_array_equal(values, TAKEN[take](column).astype(np.int8) - zero)
