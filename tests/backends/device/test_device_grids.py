"""CUDA limits a grid's second and third axis to 65,535 programs: many tokens or heads go along the first."""

import torch
from klfast.kernels import (
    causal_conv1d,
    decode_attention,
    dequant_matmul,
    gathered_logits,
    logit_divergence,
    rms_norm,
    selective_scan,
    ssd_scan,
)
from klfast.kernels.ssm_common import NO_LIMIT

from klfast import QuantSpec
from klfast.quant.layouts import Tiling

MANY = 70_000


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def check(*launches):
    for launch in launches:
        assert all(programs <= 65_535 for programs in launch.grid[1:]), (launch.kernel.__name__, launch.grid)


def test_many_sequences():
    x, state = empty(MANY, 32, 1, 16), empty(MANY, 1, 16, 16, dtype=torch.float32)
    a, d = empty(1, 16, 16, dtype=torch.float32), empty(1, 16, dtype=torch.float32)
    scan = dict(x=x, b=x, c=x, d=d, z=x, first=state, last=state, y=x, softplus=True, dt_limit=NO_LIMIT)
    check(selective_scan.plan(dt=x, a=a, bias=d, **scan))
    for family in ("nvidia", "intel"):
        check(*ssd_scan.plan(dt=x[..., 0], a=d[:, 0], bias=d[:, 0], family=family, **scan))
    check(causal_conv1d.plan(empty(MANY, 48, 4), empty(48, 4), empty(48), None, empty(MANY, 48, 4), True))
    check(
        *decode_attention.plan(
            empty(MANY, 1, 16), empty(MANY, 1, 300, 16), empty(MANY, 1, 300, 16), empty(MANY, 1, 16), 1.0, cores=132
        )
    )


def test_many_tokens():
    x = empty(MANY, 1, 64)
    check(rms_norm.plan(x, empty(64), None, x, 1e-5, 16))
    logits, anchor = empty(MANY, 500), empty(MANY, dtype=torch.float32)
    check(
        logit_divergence.plan_anchors(logits, logits, anchor),
        logit_divergence.plan_sums(logits, logits, None, anchor, family="nvidia", cores=132)[0],
    )
    index = empty(MANY, 1, dtype=torch.int64)
    check(gathered_logits.plan(x.view(1, MANY, 64), empty(100, 64), index, empty(1, MANY, 1, dtype=torch.float32)))
    tiling = Tiling.of(1024, 4, 64)
    weight = dequant_matmul.Weight(
        empty(tiling.n_tiles, 16, 64, dtype=torch.uint8), empty(16, 16), k=1024, spec=QuantSpec(4, 64)
    )
    for int8 in (False, True):
        launches = dequant_matmul.plan(
            empty(MANY, 1024), weight, None, empty(MANY, 16), int8=int8, family="nvidia", cores=132_000
        )
        assert launches[-1].kernel is dequant_matmul.split_sum
        check(*launches)
