"""The gated delta rule, by its decays."""

from __future__ import annotations

from collections.abc import Iterator

import test_delta_rule
import torch

from klfast import ops
from xpu.cases.case import ROUNDING, Case, error


def cases() -> Iterator[Case]:
    for form in test_delta_rule.FORMS:
        for length in (16, 1):
            yield delta_rule_case(1, length, 16, 32, 128, 128, form, torch.bfloat16)
        yield delta_rule_case(2, 9, 1, 3, 21, 5, form, torch.float32)


def delta_rule_case(
    batch: int, length: int, groups: int, heads: int, keys: int, values: int, form: str, dtype: torch.dtype
) -> Case:
    def run() -> float:
        args = test_delta_rule.operands(batch, length, groups, heads, keys, values, form)
        q, k, v = (t.to(dtype).contiguous() for t in args[:3])
        g, beta = args[3].contiguous(), args[4].to(dtype).contiguous()
        state = torch.randn(batch, heads, keys, values)
        truth, last = test_delta_rule.truth(q, k, v, g, beta, state)
        y = ops.gated_delta_rule_update(state, q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
        return max(error(y, truth), error(state, last) * ROUNDING[dtype] / ROUNDING[torch.float32])

    shape = f"{batch} x {length} x {heads} x {values}, {groups} x {keys} keys, a decay a {form}"
    return Case(f"gated_delta_rule, {str(dtype)[6:]}", shape, run, ROUNDING[dtype])
