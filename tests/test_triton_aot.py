"""Each shipped configuration, compiled for an NVIDIA GPU (sm_90) that is not there: registers, spills, matrix instructions."""

import pytest
import torch
from triton_aot import compile_for_hopper

from klfast import QuantSpec
from klfast.kernels import dequant_matmul, linear_divergence, logit_divergence
from klfast.layouts import Tiling

SHARED_LIMIT = 227 * 1024
CORES = 132


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def check(launch, matrix=None):
    """No spills, within the limits, and the matrix instruction (none if None)."""
    compiled = compile_for_hopper(launch)
    told = f"{launch.kernel.__name__} {launch.args} {launch.options}: {compiled}"
    assert compiled.stack == 0 and not compiled.count("STL", "LDL"), told
    assert compiled.registers <= 255 and compiled.shared <= SHARED_LIMIT, told
    assert bool(compiled.count("HGMMA", "HMMA")) == (matrix == "float"), told
    assert bool(compiled.count("IGMMA", "IMMA")) == (matrix == "int8"), told
    return compiled


def dequant_launches(m, spec, dtype, activation="exact", n=8192, k=8192):
    tiling, groups = Tiling.of(k, spec.bits, spec.group_size), spec.n_groups(k)
    zero_point = None if spec.symmetric else empty(groups, n, dtype=torch.uint8)
    return dequant_matmul.plan(
        empty(m, tiling.n_blocks * tiling.block, dtype=dtype), empty(tiling.n_tiles, n, tiling.block, dtype=torch.uint8),
        empty(groups, n, dtype=torch.float16), zero_point, empty(n, dtype=dtype), empty(m, n, dtype=dtype),
        k, spec.bits, spec.group_size, int8=activation == "int8", family="nvidia", cores=CORES,
    )  # fmt: skip


DEQUANT_SPECS = [QuantSpec(4, 128), QuantSpec(4, 32, False), QuantSpec(8, -1), QuantSpec(8, 64, False)]


@pytest.mark.parametrize("spec", DEQUANT_SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_dequant_gemm(spec, dtype):
    activation, dtype = ("int8", torch.float16) if dtype is torch.int8 else ("exact", dtype)
    for config in dequant_matmul.GEMM["nvidia", torch.int8 if activation == "int8" else dtype]:
        (launch,) = [one for one in dequant_launches(min(config.rows, 4096), spec, dtype, activation) if one.kernel.__name__ == "dequant_gemm"]
        assert launch.args["BM"] == config.BM and launch.args["BN"] == config.BN
        check(launch, "int8" if activation == "int8" else "float")


@pytest.mark.parametrize("spec", DEQUANT_SPECS, ids=str)
def test_dequant_gemv(spec):
    compiled = check(dequant_launches(1, spec, torch.float16)[0])
    assert compiled.count("LDG.E.128"), "the weight comes in pieces of 16 bytes"
    assert compiled.count("BAR") <= 1, "threads meet once, at the end"


def test_rounding_and_sums():
    rounding, _, total = dequant_launches(16, QuantSpec(4, 128), torch.bfloat16, "int8")
    assert rounding.kernel.__name__ == "quantize_rows" and total.kernel.__name__ == "split_sum"
    check(rounding)
    check(total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logit_divergence(dtype):
    teacher, student = empty(512, 50280, dtype=dtype), empty(512, 50280, dtype=dtype)
    for rows in (None, empty(7, dtype=torch.int64)):
        launch, _, _ = logit_divergence.plan_sums(teacher, student, rows, empty(7, dtype=torch.float32), family="nvidia", cores=CORES)
        check(launch)
    check(logit_divergence.plan_anchors(teacher, student, empty(512, dtype=torch.float32)))


def side(dtype, spec=None, tokens=4096, features=2048, vocab=50280):
    hidden = empty(tokens, features, dtype=dtype)
    if spec is None:
        return linear_divergence.Side(hidden, empty(vocab, features, dtype=dtype))
    tiling, groups = Tiling.of(features, spec.bits, spec.group_size), spec.n_groups(features)
    zero_point = None if spec.symmetric else empty(groups, vocab, dtype=torch.uint8)
    packed = empty(tiling.n_tiles, vocab, tiling.block, dtype=torch.uint8)
    return linear_divergence.Side(hidden, packed, empty(groups, vocab, dtype=torch.float16), zero_point, features, spec.bits, spec.group_size)


@pytest.mark.parametrize("spec", [None, QuantSpec(4, 128), QuantSpec(8, 64, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_linear_divergence(dtype, spec):
    """float32 times float32 has no matrix instruction that rounds nothing."""
    anchor = empty(4096, dtype=torch.float32)
    launch, _, _ = linear_divergence.plan_sums(side(dtype), side(dtype, spec), 4096, 50280, None, anchor, family="nvidia", cores=CORES)
    check(launch, "float" if spec is not None or dtype is not torch.float32 else None)
