"""Triton's divergence kernels against float64: the CPU kernels' cases, where they apply."""

import itertools
import math
import warnings

import pytest
import test_divergence as cases
import test_divergence_range as ranges
import torch
from klfast.kernels import divergence_terms, launch

# Each of these takes the tier that runs it, here Triton.
from test_divergence import (  # noqa: F401
    test_a_few_changed_entries_among_equal_ones,
    test_equal_rows_are_exactly_zero,
    test_strides_and_leading_dimensions,
    test_ties_go_to_the_lowest_index,
)

import klfast
from klfast import _C
from klfast.backends.triton import divergence as triton_divergence
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import SlowPathWarning
from klfast.quant.formats import PackedIntegers


@pytest.fixture
def tier():
    return "triton"


@pytest.fixture(autouse=True)
def _on_the_device(device, monkeypatch):
    """Create the cases' tensors on the device, and return results from it."""
    if device.type == "cpu":
        return
    for name in ("logit_divergence", "linear_divergence"):
        function = getattr(klfast, name)

        def moved(*args, function=function):
            found = function(*(t.to(device) if hasattr(t, "to") else t for t in args))
            return type(found)(*(None if t is None else t.cpu() for t in vars(found).values()))

        monkeypatch.setattr(klfast, name, moved)


@pytest.mark.parametrize("vocab", [1, 63, 2049])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.4, 8.0])
def test_random_logits(vocab, size):
    cases.test_random_logits("triton", vocab, size)


@pytest.mark.parametrize(("size", "kl"), [(1.4e-4, 1e-8), (10.0, 30.0)])
def test_kl_of_every_size_at_a_real_vocabulary(size, kl):
    cases.test_kl_of_every_size_at_a_real_vocabulary("triton", size, kl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_mixed_dtypes(dtype):
    cases.test_half_precision_and_mixed_dtypes("triton", dtype, 1600)


def test_misleading_first_columns():
    """The anchor comes from the first 2,048; where they mislead, the row runs again."""
    teacher = torch.randn(4, 4096)
    for shift in (0.5, -20.0):
        student = teacher + 0.01 * torch.randn(4, 4096)
        student[:3, :2048] += shift
        teacher[:, 3000], student[:, 3000] = 25, 25.01
        cases.assert_matches(klfast.logit_divergence(teacher, student), cases.truth(teacher, student), rtol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_not_finite(value, who):
    logits = {"teacher": torch.randn(5, 3000), "student": torch.randn(5, 3000)}
    logits[who][3, 2900] = value
    with pytest.raises(klfast.KlfastError, match=f"the {who}'s logit of token 3, vocabulary entry 2900, is a NaN"):
        klfast.logit_divergence(logits["teacher"], logits["student"])


@pytest.mark.parametrize("who", ["teacher", "student", "both", "different", "near"])
@pytest.mark.parametrize("mask", [-65504.0, -1e9, -1e17])
def test_masks(who, mask):
    """By the kernels alone: no warning of tokens on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        for noise, vocab, entries in ((1e-3, 50, 7), (0.1, 3000, 400), (2.0, 3000, 2995)):
            teacher, student = ranges.masked(who, mask, noise, vocab, entries)
            targets = torch.randint(0, vocab, (3,))
            cases.assert_matches(
                klfast.logit_divergence(teacher, student, targets), ranges.expected_of(teacher, student, targets)
            )


LARGE = {
    "mask": lambda: ranges.masked("teacher", ranges.LOWEST, 0.1, 3000, 400),
    "mask in both": lambda: ranges.masked("both", -1e30, 0.1, 3000, 400),
    "scale": lambda: (1e9 * torch.randn(3, 3000), 1e9 * torch.randn(3, 3000)),
    "shift": lambda: (torch.randn(3, 3000), torch.randn(3, 3000) - 1e4),
}


@pytest.mark.parametrize("kind", LARGE)
def test_too_large_for_the_kernels(kind, monkeypatch):
    (teacher, student), targets = LARGE[kind](), torch.randint(0, 3000, (3,))
    teacher[1], student[1] = torch.randn(2, 3000)  # an ordinary row among them
    with pytest.warns(SlowPathWarning, match=r"logit_divergence \[3, 3000\] runs on the CPU for some tokens"):
        found = klfast.logit_divergence(teacher, student, targets)
    expected = ranges.expected_of(teacher, student, targets)
    cases.assert_matches(found, expected)
    with pytest.warns(SlowPathWarning, match=r"linear_divergence \[3, 3\] runs on the CPU for some tokens"):
        found = klfast.linear_divergence(torch.eye(3), teacher.T, torch.eye(3), student.T, targets)
    cases.assert_matches(found, expected, rtol=1e-4)


def test_names_of_wide_tokens():
    teacher, student = torch.randn(3, 300), 1e4 * torch.randn(3, 300)
    student[2, 7] = math.inf
    with pytest.raises(
        klfast.KlfastError, match="the student's logit of token 2, vocabulary entry 7, is a NaN or an infinity"
    ):
        klfast.logit_divergence(teacher, student)


def test_the_extension_reads_what_the_kernels_store():
    assert _C.divergence_part_floats == divergence_terms.N_SUMS


@pytest.mark.parametrize("are_both_sure", [True, False])
def test_cross_entropies_of_sure_models(are_both_sure):
    models = ranges.sure_models(60, 2.0, 20.0, are_both_sure)
    cases.assert_matches(klfast.logit_divergence(*models), cases.truth(*models))


def test_split_over_the_vocabulary(monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda _: 100)
    teacher = 3 * torch.randn(3, 20_000)
    student = teacher + 0.3 * torch.randn(3, 20_000)
    targets = torch.tensor([0, -100, 19_999])
    cases.assert_matches(klfast.logit_divergence(teacher, student, targets), cases.truth(teacher, student, targets))


def test_the_largest_vocabulary():
    teacher = 3 * torch.randn(1, 256_000)
    student, targets = teacher + 0.1 * torch.randn(1, 256_000), torch.tensor([255_999])
    cases.assert_matches(klfast.logit_divergence(teacher, student, targets), cases.truth(teacher, student, targets))


@pytest.mark.parametrize("students", [1, 3])
def test_linear_equals_logits(students):
    cases.test_linear_equals_logits("triton", 300, students)


@pytest.mark.parametrize(
    "spec",
    [klfast.QuantSpec(4, 8), klfast.QuantSpec(4, 64, False), klfast.QuantSpec(6, 64), klfast.QuantSpec(8, -1, False)],
    ids=str,
)
def test_quantized_heads(spec, family):
    hidden, head = torch.randn(4, 70), torch.randn(205, 70)
    qt = klfast.quantize(head, spec)
    plain, rounded = hidden @ head.T, hidden @ qt.dequantize(torch.float32).T
    targets = torch.randint(0, 205, (4,))
    qt = qt.to_layout(klfast.Layout.TILED)
    for teacher, student, logits in (
        (head, qt, (plain, rounded)),
        (qt, head, (rounded, plain)),
        (qt, qt, (rounded, rounded)),
    ):
        cases.assert_matches(
            klfast.linear_divergence(hidden, teacher, hidden, student, targets),
            cases.truth(*logits, targets),
            rtol=1e-3,
        )


def test_plain_heads_are_converted_once_with_a_warning(monkeypatch):
    """With tokens in any number of parts."""
    monkeypatch.setattr(triton_divergence, "AT_ONCE", 2)
    converted, convert = [], PackedIntegers.convert
    monkeypatch.setattr(PackedIntegers, "convert", lambda *args: converted.append(args[-2:]) or convert(*args))
    hidden, qt = torch.randn(7, 70), klfast.quantize(torch.randn(205, 70), klfast.QuantSpec(4, 32, False))
    other, targets = klfast.quantize(torch.randn(205, 70), klfast.QuantSpec(8, -1)), torch.randint(0, 205, (7,))
    logits = [hidden @ each.dequantize(torch.float32).T for each in (qt, other)]
    with pytest.warns(SlowPathWarning, match=r"linear_divergence \[7, 70\].*to_layout"):
        found = klfast.linear_divergence(hidden, qt, hidden, other, targets)
    cases.assert_matches(found, cases.truth(*logits, targets), rtol=1e-3)
    assert converted.count((klfast.Layout.PLAIN, klfast.Layout.TILED)) == 2


@pytest.mark.parametrize("dtypes", itertools.combinations_with_replacement(FLOAT_DTYPES, 2), ids=str)
def test_linear_with_every_configuration(family, dtypes):
    hidden, head = torch.randn(35, 96).to(dtypes[0]), torch.randn(70, 96).to(dtypes[1])
    student = (hidden.float() + 0.1 * torch.randn(35, 96)).to(dtypes[0])
    logits = hidden.double() @ head.double().T, student.double() @ head.double().T
    # A float32 sum of 96 products is off by up to 5e-6, a KL by sqrt(2 KL) times that: 3e-4 of the smaller ones.
    cases.assert_matches(klfast.linear_divergence(hidden, head, student, head), cases.truth(*logits), rtol=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_of_half_precision(dtype):
    teacher, head = torch.randn(70, 64).to(dtype), torch.randn(150, 64).to(dtype)
    student = (teacher.float() + 0.1 * torch.randn(70, 64)).to(dtype)
    logits = teacher.float() @ head.float().T, student.float() @ head.float().T
    cases.assert_matches(klfast.linear_divergence(teacher, head, student, head), cases.truth(*logits), rtol=1e-4)
    cases.assert_matches(
        klfast.linear_divergence(teacher, head.float(), student, head), cases.truth(*logits), rtol=1e-4
    )


def test_linear_of_other_widths_and_split_over_the_vocabulary(monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda _: 100)
    (teacher, t_head), (student, s_head) = (
        (torch.randn(5, 33), torch.randn(4300, 33)),
        (torch.randn(5, 20), torch.randn(20, 4300).T),
    )
    cases.assert_matches(
        klfast.linear_divergence(teacher, t_head, student, s_head),
        cases.truth(teacher @ t_head.T, student @ s_head.T),
        rtol=1e-4,
    )


def test_linear_with_misleading_first_entries():
    """The first anchor comes from entries 0 to 255; where they mislead, the token runs again."""
    teacher = torch.randn(4, 300)
    student = teacher + 0.01 * torch.randn(4, 300)
    student[1:, :256] += 3.0
    teacher[:, 270], student[:, 270] = 25, 25.01
    found = klfast.linear_divergence(torch.eye(4), teacher.T, torch.eye(4), student.T)
    cases.assert_matches(found, cases.truth(teacher, student), rtol=1e-4)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_linear_of_not_finite_logits(who):
    hidden = {"teacher": torch.randn(5, 4), "student": torch.randn(5, 4)}
    head = {"teacher": torch.randn(300, 4), "student": torch.randn(300, 4)}
    head[who][290, 1] = math.nan
    with pytest.raises(klfast.KlfastError, match=f"the {who}'s logit of token 0, vocabulary entry 290, is a NaN"):
        klfast.linear_divergence(hidden["teacher"], head["teacher"], hidden["student"], head["student"])


def test_no_tokens():
    cases.test_no_tokens("triton")
