"""Every launch of klfast.kernels for one family of devices: (name, launch, required matrix instruction or None)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from klfast.kernels import (
    causal_conv1d,
    decode_attention,
    dequant_matmul,
    gated_delta_rule,
    gathered_logits,
    linear_divergence,
    logit_divergence,
    rms_norm,
    selective_scan,
    ssd_scan,
)
from klfast.kernels.launch import Launch

from klfast import QuantSpec
from klfast.quant.layouts import Layout

CORES = {"nvidia": 132, "intel": 8}
SPECS = [QuantSpec(4, 64), QuantSpec(8, 64, False)]  # the first, klfast's default, with every configuration
# These compile to other code: how a tile's scales are applied, with or without zero points, blocks per group.
OTHER_SPECS = [
    QuantSpec(4, 64, False),
    QuantSpec(4, 32, False),
    QuantSpec(4, 128),
    QuantSpec(4, 128, False),
    QuantSpec(4, -1),
    QuantSpec(6, 64),
    QuantSpec(6, 32, False),
    QuantSpec(8, 32),
    QuantSpec(8, -1),
]
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def quantized(n: int, k: int, spec: QuantSpec) -> dequant_matmul.Weight:
    parts = (empty(*part.shape, dtype=part.dtypes[0]) for part in spec.format.parts((n, k), spec, Layout.TILED))
    return dequant_matmul.Weight(*parts, k=k, spec=spec)


def dequant(
    family: str,
    m: int,
    spec: QuantSpec,
    dtype: torch.dtype,
    activation: str = "exact",
    n: int = 8192,
    k: int = 8192,
    shared: int = dequant_matmul.MANY,
) -> list[Launch]:
    weight = quantized(n, k, spec)
    return dequant_matmul.plan(
        empty(m, weight.tiling.n_blocks * weight.tiling.block, dtype=dtype),
        weight,
        empty(n, dtype=dtype),
        empty(m, n, dtype=dtype),
        int8=activation == "int8",
        family=family,
        cores=CORES[family],
        shared=shared,
    )


def side(
    dtype: torch.dtype, spec: QuantSpec | None = None, tokens: int = 4096, features: int = 2048, vocab: int = 50280
) -> linear_divergence.Side:
    hidden = empty(tokens, features, dtype=dtype)
    if spec is None:
        return linear_divergence.Side(hidden, empty(vocab, features, dtype=dtype))
    return linear_divergence.Side(hidden, quantized(vocab, features, spec))


def heads() -> Iterator[tuple[str, Launch, str | None]]:
    def sums(teacher: linear_divergence.Side, student: linear_divergence.Side) -> Launch:
        return linear_divergence.plan_sums(
            teacher, student, 4096, 50280, None, empty(4096, dtype=torch.float32), cores=CORES["intel"]
        )[0]

    for name, dtype in FLOATS.items():
        for spec in (None, *SPECS, *(OTHER_SPECS[:1] if dtype is torch.float32 else ())):
            yield f"linear_divergence {name} {spec or 'float head'}", sums(side(dtype), side(dtype, spec)), "float"
    mixed = side(torch.float32), side(torch.bfloat16, SPECS[0])
    yield f"linear_divergence float32 teacher, bfloat16 student {SPECS[0]}", sums(*mixed), "float"


def launches(family: str) -> Iterator[tuple[str, Launch, str | None]]:
    for spec in SPECS:
        for name, dtype in FLOATS.items():
            one, *_ = dequant(family, 1, spec, dtype)
            if one.kernel.__name__ == "dequant_gemv":
                yield f"dequant_gemv {name} {spec}", one, None
        for x in (*FLOATS, "int8"):
            activation = "int8" if x == "int8" else "exact"
            dtype = FLOATS.get(x, torch.float16)
            configurations = dequant_matmul.GEMM[family, torch.int8 if x == "int8" else dtype]
            for config in configurations if spec is SPECS[0] else configurations[-1:]:
                for one in dequant(family, min(config.rows, 4096), spec, dtype, activation, shared=config.shared):
                    if one.kernel.__name__ == "dequant_gemm":
                        yield (
                            f"dequant_gemm {x} {spec} {config.BM}x{config.BN}",
                            one,
                            "int8" if x == "int8" else "float",
                        )
    for spec in OTHER_SPECS:  # with their largest tiles and the widest floats, which need the most registers
        for x in ("float32", "int8"):
            *_, one = dequant(family, 4096, spec, FLOATS.get(x, torch.float16), "int8" if x == "int8" else "exact")
            yield f"dequant_gemm {x} {spec} {one.args['BM']}x{one.args['BN']}", one, "int8" if x == "int8" else "float"
        yield f"dequant_gemv float32 {spec}", dequant(family, 1, spec, torch.float32)[0], None
    rounding, *_ = dequant(family, 16, SPECS[0], torch.bfloat16, "int8")
    yield "quantize_rows", rounding, None
    args = dict(
        part_ptr=empty(4, 16, 4096, dtype=torch.float32),
        bias_ptr=None,
        y_ptr=empty(16, 4096, dtype=torch.bfloat16),
        M=16,
        N=4096,
        PARTS=4,
        BN=256,
    )
    yield "split_sum", Launch(dequant_matmul.split_sum, (16, 16), args, dict(num_warps=4)), None
    for name, dtype in FLOATS.items():
        logits, anchor = empty(512, 50280, dtype=dtype), empty(512, dtype=torch.float32)
        yield (
            f"logit_divergence {name}",
            logit_divergence.plan_sums(logits, logits, None, anchor, family=family, cores=CORES[family])[0],
            None,
        )
        yield f"first_anchors {name}", logit_divergence.plan_anchors(logits, logits, anchor), None
        picked = empty(16, 512, 129, dtype=torch.float32)
        index = empty(512, 129, dtype=torch.int64)
        hidden, head = empty(16, 512, 768, dtype=torch.float32), empty(50280, 768, dtype=dtype)
        yield f"gathered_logits {name}", gathered_logits.plan(hidden, head, index, picked), "float"
    if family == "intel":
        yield from heads()
    rows = empty(7, dtype=torch.int64)
    logits = empty(512, 50280, dtype=torch.bfloat16)
    again = logit_divergence.plan_sums(
        logits, logits, rows, empty(7, dtype=torch.float32), family=family, cores=CORES[family]
    )[0]
    yield "logit_divergence, some rows", again, None
    yield from state_space()
    yield from states_in_a_cache()
    yield from delta_rule()
    yield from chunks(family)
    yield from norms()
    yield from attention(family, 100, 4096)


def state_space() -> Iterator[tuple[str, Launch, str | None]]:
    """Yield launches with Mamba's and Mamba-2's sizes, for a prompt and a decoding step, in bfloat16."""

    def some(*shape):
        return empty(*shape, dtype=torch.bfloat16)

    for length in (512, 1):
        x, past = some(2, length, 1536).transpose(1, 2), empty(2, 1536, 4, dtype=torch.float32)
        yield f"causal_conv1d of {length}", causal_conv1d.plan(x, some(1536, 4), some(1536), past, x, True), None
        yield f"keep_last of {length}", causal_conv1d.plan_state(x, past, past), None
        for name, heads, channels, size in (("Mamba", 1, 1536, 16), ("Mamba-2", 24, 64, 128)):
            x, b = some(2, length, heads, channels), some(2, length, 1, size)
            a, d = empty(heads, channels, size, dtype=torch.float32), empty(heads, channels, dtype=torch.float32)
            state = empty(2, heads, channels, size, dtype=torch.float32)
            for limit in ((float("-inf"), float("inf")), (0.0, 1.0)):
                launch = selective_scan.plan(
                    x=x,
                    dt=x,
                    a=a,
                    b=b,
                    c=b,
                    d=d,
                    bias=d,
                    z=x,
                    first=state,
                    last=state,
                    y=x,
                    softplus=True,
                    dt_limit=limit,
                )
                yield f"selective_scan, {name}, {length} steps{', dt clamped' if limit[0] == 0 else ''}", launch, None


def states_in_a_cache() -> Iterator[tuple[str, Launch, str | None]]:
    """Yield launches of decoding steps with states in a cache, in rings too, and of a scan with constant B or C."""

    def some(*shape, dtype=torch.bfloat16):
        return empty(*shape, dtype=dtype)

    slots, seen = (empty(2, dtype=dtype) for dtype in (torch.int64, torch.int32))
    x, past = some(2, 1536, 1), some(9, 1536, 4, dtype=torch.float32)
    for name, states in (
        ("a cache", causal_conv1d.States(slots)),
        ("rings in a cache", causal_conv1d.States(slots, -1, seen)),
    ):
        yield f"causal_conv1d in {name}", causal_conv1d.plan(x, some(1536, 4), None, past, x, True, states), None
        yield f"keep_last in {name}", causal_conv1d.plan_state(x, past, past, states), None
    x, b, a = some(2, 1, 24, 64), some(2, 1, 1, 128), some(24, 64, 128, dtype=torch.float32)
    state = some(9, 24, 64, 128, dtype=torch.float32)
    plain = dict(x=x, dt=x, a=a, d=None, bias=None, z=None, y=x, softplus=True)
    in_cache = selective_scan.plan(b=b, c=b, first=state, last=state, slots=slots, **plain)
    yield "selective_scan in a cache", in_cache, None
    for name, kinds in (("B", dict(b=a, c=b)), ("C", dict(b=b, c=a)), ("B and C", dict(b=a, c=a))):
        launch = selective_scan.plan(**kinds, first=None, last=None, **plain)
        yield f"selective_scan, {name} constant", launch, None


def delta_rule() -> Iterator[tuple[str, Launch, str | None]]:
    """Yield launches with Qwen3.5-4B's sizes (and those of KDA), for a prompt and a decoding step."""
    state = empty(2, 32, 128, 128, dtype=torch.float32)
    for length in (512, 1):
        q, v = (empty(2, length, heads, 128, dtype=torch.bfloat16) for heads in (16, 32))
        beta = empty(2, length, 32, dtype=torch.bfloat16)
        for what, shape in (("head", ()), ("channel", (128,))):
            g = empty(2, length, 32, *shape, dtype=torch.float32)
            launch = gated_delta_rule.plan(
                q=q, k=q, v=v, g=g, beta=beta, state=state, y=v, scale=128**-0.5, normalize=True
            )
            yield f"gated_delta_rule, a decay a {what}, {length} tokens", launch, None


def chunks(family: str) -> Iterator[tuple[str, Launch, str | None]]:
    """Yield launches with Mamba-2's sizes, for a prompt."""
    for name, dtype in FLOATS.items():
        x, dt, b = (empty(2, 512, *shape, dtype=dtype) for shape in ((24, 64), (24,), (1, 128)))
        if ssd_scan.is_for(x, b, b):
            head, d, state = (empty(*shape, dtype=torch.float32) for shape in ((24,), (24, 64), (2, 24, 64, 128)))
            for limit in ((float("-inf"), float("inf")), (0.0, 1.0)):
                for launch in ssd_scan.plan(
                    x=x,
                    dt=dt,
                    a=head,
                    b=b,
                    c=b,
                    d=d,
                    bias=head,
                    z=x,
                    first=state,
                    last=state,
                    y=x,
                    softplus=True,
                    dt_limit=limit,
                    family=family,
                ):
                    yield f"{launch.kernel.__name__} {name}{', dt clamped' if limit[0] == 0 else ''}", launch, "float"


def norms() -> Iterator[tuple[str, Launch, str | None]]:
    """Yield norms before a block (Mamba-130M, FalconMamba-7B), after a mixer (gated), of dt, B and C, and of heads."""
    for length in (512, 1):
        for channels, group, is_gated in (
            (768, 768, False),
            (4096, 4096, False),
            (5120, 5120, True),
            (1536, 192, True),
            (16, 16, False),
        ):
            x = empty(2, length, channels, dtype=torch.bfloat16)
            gate = empty(2, length, 2 * channels, dtype=torch.bfloat16)[..., :channels] if is_gated else None
            launch = rms_norm.plan(x, empty(channels, dtype=torch.float32), gate, x, 1e-5, group)
            yield (
                f"rms_norm{', gated' if is_gated else ''}, {channels} in groups of {group}, {length} tokens",
                launch,
                None,
            )
    x = empty(2, 512 * 32, 128, dtype=torch.bfloat16)
    for is_sigmoid in (False, True):
        launch = rms_norm.plan(x, empty(128, dtype=torch.float32), x, x, 1e-6, 128, True, is_sigmoid)
        yield f"rms_norm of 32 heads, then a {'sigmoid' if is_sigmoid else 'silu'} gate", launch, None


def attention(family: str, *lengths: int) -> Iterator[tuple[str, Launch, str | None]]:
    """Yield launches with Hymba-1.5B's heads, for one sequence with each number of keys."""
    for keys in lengths:
        q, k, v, y = (
            empty(1, *shape, dtype=torch.bfloat16) for shape in ((25, 64), (5, keys, 64), (5, keys, 128), (25, 128))
        )
        for one in decode_attention.plan(q, k, v, y, 0.125, cores=CORES[family]):
            yield f"{one.kernel.__name__} of {keys} keys", one, None
