"""grouped_dequant_matmul at every tier: against float64; what it reads; memory bounds, threads, bad input."""

import pytest
import torch
from guarded_memory import guarded
from test_dequant_matmul import CHECKS, TIERS, with_signs

from klfast import QuantizedTensor, QuantSpec, quantize, using
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.ops import grouped_dequant_matmul

SPECS = [QuantSpec(4, 32), QuantSpec(4, 64, False), QuantSpec(6, 32, False), QuantSpec(8, -1), QuantSpec(8, 32, False)]
# Matrices, N, K, rows of x, matrices a row meets. The zero points of 37 rows end within a word.
SHAPES = [(5, 37, 131, 1, 3), (3, 32, 96, 7, 2), (2, 37, 321, 40, 1), (9, 16, 64, 5, 4), (1, 1, 1, 1, 1)]


def operands(count, n, k, rows, each, spec, dtype=torch.float32):
    """Return x, matrices with varying zero points, and the numbers of those that each row meets, all different."""
    qt = quantize(torch.randn(count * n, k) + torch.randn(count * n, 1), spec)
    index = torch.rand(rows, count).argsort(1)[:, :each]
    return torch.randn(rows, k).to(dtype), qt, index


def check(x, qt, index, count, got, activation="exact"):
    n = qt.shape[0] // count
    assert got.shape == (*index.shape, n)
    weight = qt.dequantize(torch.float32).view(count, n, -1)
    for i in index.unique().tolist():
        row, place = (index == i).nonzero(as_tuple=True)
        CHECKS[activation](x[row], Single(weight[i], qt.spec), None, got[row, place])


class Single:
    """A matrix as ``CHECKS`` reads it."""

    def __init__(self, weight, spec):
        self.weight, self.spec = weight, spec

    def dequantize(self, dtype):
        return self.weight.to(dtype)


@pytest.mark.parametrize("activation", CHECKS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_against_float64(tier, spec, dtype, activation):
    for count, *shape in SHAPES:
        x, qt, index = operands(count, *shape, spec, dtype)
        check(x, qt, index, count, grouped_dequant_matmul(x, qt, index, count, activation=activation), activation)


@pytest.mark.parametrize("activation", CHECKS)
def test_scales_of_either_sign(tier, activation):
    for count, *shape in SHAPES:
        x, qt, index = operands(count, *shape, QuantSpec(4, 32))
        signed = with_signs(qt)
        check(
            x, signed, index, count, grouped_dequant_matmul(x, signed, index, count, activation=activation), activation
        )


def test_routing_of_every_kind(tier):
    """All rows to one matrix, in runs, scattered, the same matrix twice, from x with other strides or dimensions."""
    spec, count, n, k = QuantSpec(4, 32, False), 4, 20, 96
    x, qt, _ = operands(count, n, k, 24, 1, spec)
    for index in (
        torch.full((24, 1), 2),
        torch.arange(24).unsqueeze(1) // 6,
        torch.arange(24).unsqueeze(1) % 3 + 1,
        torch.tensor([[3, 3, 0]]).expand(24, 3),
        torch.randint(count, (5, 24)).T,
    ):
        check(x, qt, index, count, grouped_dequant_matmul(x, qt, index, count))
    index = torch.randint(count, (24, 2))
    want = grouped_dequant_matmul(x, qt, index, count)
    folded = grouped_dequant_matmul(x.view(2, 3, 4, k), qt, index.view(2, 3, 4, 2), count)
    assert torch.equal(folded.view_as(want), want)
    for other in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :k]):
        torch.testing.assert_close(grouped_dequant_matmul(other, qt, index, count), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grouped_dequant_matmul(x[0], qt, index[0], count), want[0], rtol=1e-5, atol=1e-4)


def test_nothing_to_do(tier):
    x, qt, index = operands(3, 8, 64, 4, 2, QuantSpec(4, 32))
    assert grouped_dequant_matmul(x[:0], qt, index[:0], 3).shape == (0, 2, 8)
    assert grouped_dequant_matmul(x, qt, index[:, :0], 3).shape == (4, 0, 8)
    empty = QuantizedTensor([torch.zeros(0, 8, dtype=torch.int32), torch.ones(0, 2)], (0, 64), QuantSpec(4, 32))
    assert grouped_dequant_matmul(x, empty, index, 3).shape == (4, 2, 0)
    narrow = QuantizedTensor([torch.zeros(24, 0, dtype=torch.int32), torch.ones(24, 0)], (24, 0), QuantSpec(4, 32))
    assert torch.equal(grouped_dequant_matmul(x[:, :0], narrow, index, 3), torch.zeros(4, 2, 8))


@pytest.mark.parametrize("activation", CHECKS)
@pytest.mark.parametrize("rows", [1, 9])
def test_reads_only_the_matrices_that_rows_meet(tier, rows, activation):
    """The others' scales become NaN: one product with them would show."""
    count, n, spec = 16, 32, QuantSpec(4, 32, False)
    x, qt, _ = operands(count, n, 96, rows, 1, spec)
    index = torch.randint(3, 6, (rows, 3))
    want = grouped_dequant_matmul(x, qt, index, count, activation=activation)
    packed, scale, zero_point = (part.clone() for part in qt.parts)
    met = torch.zeros(count, dtype=torch.bool).index_fill(0, index.unique(), True).repeat_interleave(n)
    scale[~met] = torch.nan
    poisoned = QuantizedTensor([packed, scale, zero_point], qt.shape, spec)
    assert torch.equal(grouped_dequant_matmul(x, poisoned, index, count, activation=activation), want)
    scale[met] = torch.nan
    assert grouped_dequant_matmul(x, poisoned, index, count, activation=activation).isnan().all()


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_touches_nothing_outside(isa, spec):
    for count, *shape in SHAPES:
        x, qt, index = operands(count, *shape, spec, torch.bfloat16)
        index[-1, -1] = count - 1
        inside = QuantizedTensor([guarded(part) for part in qt.parts], qt.shape, spec)
        with using(isa):
            check(x, qt, index, count, grouped_dequant_matmul(guarded(x), inside, guarded(index), count))


def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    x, qt, index = operands(6, 200, 600, 300, 3, QuantSpec(4, 64, False))
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(grouped_dequant_matmul(x, qt, index, 6))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_opcheck():
    for spec in (QuantSpec(4, 32), QuantSpec(8, -1, False)):
        x, qt, index = operands(4, 20, 100, 3, 2, spec)
        args = (x, list(qt.parts), index, 4, 80, 100, str(spec), "plain", "exact")
        torch.library.opcheck(torch.ops.klfast.grouped_dequant_matmul.default, args)


def test_bad_input(tier):
    x, qt, index = operands(4, 20, 100, 3, 2, QuantSpec(4, 32, False))
    for message, call in {
        "float32, bfloat16 or float16": lambda: grouped_dequant_matmul(x.double(), qt, index, 4),
        r"\[..., 100\]": lambda: grouped_dequant_matmul(x[:, :99], qt, index, 4),
        r"torch.int64 \[3, 'S'\] for this x, got torch.int32": lambda: grouped_dequant_matmul(x, qt, index.int(), 4),
        r"got torch.int64 \[2, 2\]": lambda: grouped_dequant_matmul(x, qt, index[:2], 4),
        r"got torch.int64 \[3\]": lambda: grouped_dequant_matmul(x, qt, index[:, 0], 4),
        "80 rows cannot be those of 3 matrices": lambda: grouped_dequant_matmul(x, qt, index, 3),
        "80 rows cannot be those of 0 matrices": lambda: grouped_dequant_matmul(x, qt, index, 0),
        r"index must lie in 0\.\.1 for 2 matrices, got 2\.\.2": lambda: grouped_dequant_matmul(
            x, qt, torch.full((3, 2), 2), 2
        ),
        r"index must lie in 0\.\.3 for 4 matrices, got -1\.\.4": lambda: grouped_dequant_matmul(
            x, qt, torch.tensor([[-1], [0], [4]]), 4
        ),
        '"exact" or "int8"': lambda: grouped_dequant_matmul(x, qt, index, 4, activation="int4"),
        "one device": lambda: grouped_dequant_matmul(x.to("meta"), qt, index, 4),
    }.items():
        with pytest.raises(InvalidInputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
