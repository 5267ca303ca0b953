"""decode_attention, in one part and in several."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from klfast import ops
from xpu.cases.case import ROUNDING, Case, error


def cases() -> Iterator[Case]:
    yield attention_case(1, 25, 5, 100, 64, 128, torch.bfloat16)
    yield attention_case(1, 25, 5, 320, 64, 128, torch.bfloat16, cores=8)  # in two parts
    yield attention_case(2, 6, 2, 700, 48, 33, torch.float32, cores=10)


def attention_case(
    batch: int, heads: int, groups: int, keys: int, key_dim: int, value_dim: int, dtype: torch.dtype, cores: int = 1
) -> Case:
    def run() -> float:
        q, k, v = (
            torch.randn(batch, *shape).to(dtype)
            for shape in ((heads, key_dim), (groups, keys, key_dim), (groups, keys, value_dim))
        )
        found = ops.decode_attention(q, k, v, 0.125)
        wide, k, v = q.double(), *(t.double().repeat_interleave(heads // groups, 1) for t in (k, v))
        weight = torch.softmax(0.125 * torch.einsum("bhd,bhsd->bhs", wide, k), -1)
        return error(found, torch.einsum("bhs,bhsd->bhd", weight, v))

    name = f"{batch} x {heads} heads x {keys} keys, {key_dim} and {value_dim} wide{', in parts' if cores > 1 else ''}"
    return Case(f"decode_attention, {str(dtype)[6:]}", name, run, ROUNDING[dtype], cores)
