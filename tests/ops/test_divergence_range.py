"""The divergence ops on logits of any finite size: masks, large logits and large shifts, against float64."""

import random
from itertools import product

import pytest
import torch
from test_divergence import FIELDS, assert_matches, truth

import klfast
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins

LOWEST = torch.finfo(torch.float32).min
MASKS = (-65504.0, -1e4, -1e7, -1e9, -1e12, -1e17, -1e20, -1e30, torch.finfo(torch.bfloat16).min, LOWEST)


def expected_of(teacher, student, targets=None):
    """Return ``truth`` in float32's range: a larger mse is infinite."""
    return {name: value.float().double() for name, value in truth(teacher, student, targets).items()}


def masked(who, mask, noise, vocab, masked_entries):
    teacher = 3 * torch.randn(3, vocab)
    student = teacher + noise * torch.randn(3, vocab)
    entries = torch.randperm(vocab)[:masked_entries]
    if who != "student":
        teacher[:, entries] = mask
    if who != "teacher":
        student[:, entries] = {"both": mask, "student": mask, "different": -1e4, "near": -20.0}[who]
    return teacher, student


@pytest.mark.parametrize("who", ["teacher", "student", "both", "different", "near"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(who, mask):
    for noise, (vocab, entries) in product((1e-3, 0.1, 2.0), ((50, 7), (3000, 400), (3000, 2995))):
        teacher, student = masked(who, mask, noise, vocab, entries)
        targets = torch.randint(0, vocab, (3,))
        expected = expected_of(teacher, student, targets)
        for tier in ("reference", *pins.available_tiers()):
            with klfast.using(tier):
                assert_matches(klfast.logit_divergence(teacher, student, targets), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_lowest_value_of_a_smaller_dtype_as_mask(tier, dtype):
    teacher, student = masked("both", torch.finfo(dtype).min, 0.1, 2100, 100)
    teacher, student = teacher.to(dtype), student.to(dtype)
    assert_matches(klfast.logit_divergence(teacher, student), expected_of(teacher, student))


@pytest.mark.parametrize("size", [1e4, 1e6, 1e9, 1e12, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("vocab", [50, 5000])
def test_large_logits(tier, size, vocab):
    teacher, student = torch.randn(3, vocab), torch.randn(3, vocab)
    targets = torch.randint(0, vocab, (3,))
    for a, b in ((size * teacher, size * student), (teacher, size * student), (size * teacher, student)):
        assert_matches(klfast.logit_divergence(a, b, targets), expected_of(a, b, targets))


@pytest.mark.parametrize("shift", [70.0, -300.0, 1e4, -1e6, 1e9])
def test_large_shifts(tier, shift):
    """A constant changes a distribution only by rounding the logits, which is part of the input."""
    teacher = torch.randn(3, 3000)
    student = teacher + 0.1 * torch.randn(3, 3000)
    for a, b in ((teacher, student + shift), (teacher + shift, student), (teacher + shift, student + shift)):
        assert_matches(klfast.logit_divergence(a, b), expected_of(a, b))


def test_close_distributions_behind_masks_keep_their_digits(tier):
    """Masks that differ by 1e9 beside a KL of 1e-8 nats."""
    teacher = 3 * torch.randn(4, 5000)
    student = teacher + 1.4e-4 * torch.randn(4, 5000)
    teacher[:, ::7], student[:, ::7] = -1e9, -2e9
    expected = expected_of(teacher, student)
    assert 1e-9 < expected["kl_teacher_student"].mean() < 1e-7
    found = klfast.logit_divergence(teacher, student)
    for name in ("kl_teacher_student", "kl_student_teacher", "jsd"):
        torch.testing.assert_close(getattr(found, name).double(), expected[name], rtol=1e-2, atol=0)


@pytest.mark.parametrize("scale", [30.0, 1e9])
def test_linear_of_large_logits(tier, scale):
    unrelated = scale * torch.randn(3, 1030), scale * torch.randn(3, 1030)
    for teacher, student in (masked("both", -1e9, 0.1, 1030, 200), masked("near", -1e9, 1e-3, 1030, 200), unrelated):
        found = klfast.linear_divergence(torch.eye(3), teacher.T, torch.eye(3), student.T)
        assert_matches(found, expected_of(teacher, student), rtol=1e-4)


def test_a_row_further_apart_than_float32_reaches(tier):
    teacher, student = torch.randn(2, 3000), torch.randn(2, 3000)
    student[1, 7], student[1, 2500] = 3e38, -3e38
    if tier == "reference":
        assert_matches(klfast.logit_divergence(teacher, student), expected_of(teacher, student))
        return
    with pytest.raises(
        InvalidInputError, match="the student's logit of token 1, vocabulary entry 2500, is too large: the difference"
    ):
        klfast.logit_divergence(teacher, student)


def test_one_entry(tier):
    """Both distributions are certain for any logits."""
    logits = torch.tensor([[0.0], [-112.0], [347.5], [1e9], [LOWEST]])
    found = klfast.logit_divergence(logits, logits.flip(0), torch.zeros(5, dtype=torch.int64))
    for name in FIELDS[:3]:
        assert torch.equal(getattr(found, name), torch.zeros(5)), name
    for name in ("ce_teacher", "ce_student"):
        assert (getattr(found, name) >= 0).all() and getattr(found, name).max() < 1e-5


def random_pair(seed):
    """Two rows of random size, spread, shift and masks, up to float32's range."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    vocab = rng.choice([2, 17, 50, 333, 2048, 2049, 4100])
    sizes = (1, 2, 3, 8, 37)

    def size():
        return 10 ** rng.uniform(-4, rng.choice(sizes))

    def draw():
        return torch.randn(2, vocab, generator=generator)

    teacher = size() * draw()
    student = teacher + 10 ** rng.uniform(-3, 3) * draw() if rng.random() < 0.6 else size() * draw()
    if rng.random() < 0.3:
        student = student + rng.choice((1, -1)) * size()
    for _ in range(rng.randrange(3)):
        who = rng.choice(("teacher", "student", "both"))
        entries = torch.randperm(vocab, generator=generator)[: rng.choice((1, vocab // 7, vocab - 1))]
        if who != "student":
            teacher[:, entries] = rng.choice((*MASKS[:-2], -150.0, 200.0))
        if who != "teacher":
            student[:, entries] = rng.choice((*MASKS[:-2], -150.0, 200.0))
    return teacher, student, torch.randint(0, vocab, (2,), generator=generator)


@pytest.mark.parametrize("seed", range(60))
def test_random_magnitudes(seed):
    teacher, student, targets = random_pair(seed)
    expected = expected_of(teacher, student, targets)
    largest = min(256.0, max(teacher.abs().max().item(), student.abs().max().item()))
    for tier in pins.available_tiers():
        with klfast.using(tier):
            found = klfast.logit_divergence(teacher, student, targets)
        for name, value in expected.items():
            close = name in FIELDS[:3] and value.min() < 1e-5  # KL is promised to 1 %
            atol = 1e-6 + 2e-8 * largest if name.startswith("ce") else 3e-4 if name == "sqnr_db" else 1e-12
            torch.testing.assert_close(
                getattr(found, name).double(),
                value,
                rtol=1e-2 if close else 1e-4,
                atol=atol,
                equal_nan=True,
                msg=lambda m, name=name, tier=tier: f"{tier}, {name}: {m}",
            )


def sure_models(vocab, noise, apart, are_both_sure):
    """Return logits of a student, and perhaps of a teacher, who are sure of the targets, and these."""
    teacher = 3 * torch.randn(12, vocab) + apart * torch.randn(12, 1)
    student = teacher + noise * torch.randn(12, vocab) + apart * torch.randn(12, 1)
    targets = torch.randint(vocab, (12,))
    rows = torch.arange(12)
    student[rows, targets] = student.amax(-1) + 12
    if are_both_sure:
        teacher[rows, targets] = teacher.amax(-1) + 12
    return teacher, student, targets


@pytest.mark.parametrize("vocab", [1, 60])
@pytest.mark.parametrize("noise", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("apart", [20.0, 50.0, 300.0])
@pytest.mark.parametrize("are_both_sure", [True, False])
def test_cross_entropies_of_sure_models(tier, vocab, noise, apart, are_both_sure):
    """Differences of large logits lose digits in float32; a small cross-entropy must not show that."""
    models = sure_models(vocab, noise, apart, are_both_sure)
    found, expected = klfast.logit_divergence(*models), truth(*models)
    assert expected["ce_student"].max() < 1e-4
    for name in ("ce_teacher", "ce_student"):
        torch.testing.assert_close(getattr(found, name).double(), expected[name], rtol=3e-6, atol=6e-7)
