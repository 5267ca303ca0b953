"""logit_divergence and linear_divergence at every tier, against float64 computed here."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import klfast
from klfast import QuantSpec
from klfast.backends.cpu import divergence as cpu_divergence
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins

FIELDS = ("kl_teacher_student", "kl_student_teacher", "jsd", "mse", "sqnr_db", "ce_teacher", "ce_student", "top1_agree")
SIZES = (1, 2, 63, 100, 1600, 2049)


def truth(teacher, student, targets=None):
    """Compute the metrics by the textbook, in float64 (KL is right to about 1e-15)."""
    a, b = teacher.double(), student.double()
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    p, q, m = log_p.exp(), log_q.exp(), torch.logaddexp(log_p, log_q) - math.log(2)
    d = b - a
    metrics = {
        "kl_teacher_student": (p * (log_p - log_q)).sum(-1),
        "kl_student_teacher": (q * (log_q - log_p)).sum(-1),
        "jsd": (p * (log_p - m) + q * (log_q - m)).sum(-1) / 2,
        "mse": d.square().mean(-1),
        "sqnr_db": 10 * torch.log10(a.square().sum(-1) / d.square().sum(-1)),
        "top1_agree": (a.argmax(-1) == b.argmax(-1)).double(),
    }
    if targets is not None:
        for name, log in (("ce_teacher", log_p), ("ce_student", log_q)):
            metrics[name] = torch.nn.functional.nll_loss(log, targets, reduction="none", ignore_index=-100)
            metrics[name][targets == -100] = math.nan
    return metrics


def assert_matches(found, expected, rtol=3e-5):
    for name, value in expected.items():
        atol = 1e-6 if name.startswith("ce") else 1e-4 if name == "sqnr_db" else 1e-13
        torch.testing.assert_close(
            getattr(found, name).double(),
            value,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.4, 1.5, 8.0])
def test_random_logits(tier, vocab, size):
    teacher = 3 * torch.randn(6, vocab)
    student = teacher + size * torch.randn(6, vocab)
    targets = torch.randint(0, vocab, (6,))
    targets[2] = -100
    assert_matches(klfast.logit_divergence(teacher, student, targets), truth(teacher, student, targets))


@pytest.mark.parametrize(("size", "kl"), [(1.4e-4, 1e-8), (1.4e-3, 1e-6), (0.045, 1e-3), (1.5, 1.0), (10.0, 30.0)])
def test_kl_of_every_size_at_a_real_vocabulary(tier, size, kl):
    teacher = 3 * torch.randn(2, 50280)
    student = teacher + size * torch.randn(2, 50280)
    expected = truth(teacher, student)
    assert kl / 2 < expected["kl_teacher_student"].mean() < kl * 2
    assert_matches(klfast.logit_divergence(teacher, student), expected)


def test_a_few_changed_entries_among_equal_ones(tier):
    """Neither an outlier nor a constant shift may spoil the small terms."""
    teacher = 3 * torch.randn(5, 4100)
    student = teacher.clone()
    student[:, 7] += 4
    student[:, 3000] -= 9
    assert_matches(klfast.logit_divergence(teacher, student), truth(teacher, student))
    student = teacher + 1e-4 * torch.randn(5, 4100)
    student[:, teacher[0].argmin()] += 3
    assert_matches(
        klfast.logit_divergence(teacher, student + 12), truth(teacher, student + 12), rtol=1e-3
    )  # b - a is rounded at 12


def test_misleading_first_columns(tier):
    """The anchor comes from the first columns; where they mislead, the row runs again."""
    teacher = torch.randn(4, 8192)
    for shift in (0.5, 3.0, -20.0, 300.0):
        student = teacher + 0.01 * torch.randn(4, 8192)
        student[:, :2048] += shift
        teacher[:, 5000] = 25  # the entry that matters comes later
        student[:, 5000] = 25.01
        assert_matches(klfast.logit_divergence(teacher, student), truth(teacher, student), rtol=1e-4)
        hidden, rows = torch.eye(4), (teacher.T, student.T)
        assert_matches(klfast.linear_divergence(hidden, rows[0], hidden, rows[1]), truth(teacher, student), rtol=1e-4)


@pytest.mark.parametrize("largest", [1 / 16, 0.07, 0.5, 0.52, 1.0, 1.05, 1.4, 2.0])
def test_differences_of_every_size(tier, largest):
    """On both sides of the limit of each CPU loop, where its polynomials are worst."""
    teacher = torch.randn(4, 5000)
    student = teacher + largest * (2 * torch.rand(4, 5000) - 1)
    student[0] = teacher[0] + largest * torch.randn(5000).sign()  # as large as they get
    assert_matches(klfast.logit_divergence(teacher, student), truth(teacher, student))


def test_unrelated_first_columns_of_close_distributions(tier):
    """Distant first columns have no weight in the end; another row of the same call stays distant."""
    teacher, student = 3 * torch.randn(3, 6000), 3 * torch.randn(3, 6000)
    for gap in (15, 30, 60):
        teacher[:2, 5000:], student[:2, 5000:] = gap, gap
        student[:2, 5000:] += 1e-2 * torch.randn(2, 1000)
        assert_matches(klfast.logit_divergence(teacher, student), truth(teacher, student), rtol=1e-3)
        hidden = torch.eye(3)
        assert_matches(
            klfast.linear_divergence(hidden, teacher.T, hidden, student.T), truth(teacher, student), rtol=1e-3
        )


@pytest.mark.parametrize("vocab", [225, 2048])
def test_models_of_equal_logits(tier, vocab):
    """Where all weights are equal, float32 rounds each of their sums the same way."""
    equal, other = torch.linspace(0, 2, 100)[:, None].expand(100, vocab), 0.5 * torch.randn(vocab).expand(100, vocab)
    for teacher, student in ((equal, other), (other, equal)):
        assert_matches(klfast.logit_divergence(teacher, student), truth(teacher, student), rtol=1.7e-5)


def test_equal_rows_are_exactly_zero(tier):
    teacher = 5 * torch.randn(4, 3001)
    found = klfast.logit_divergence(teacher, teacher.clone())
    for name in ("kl_teacher_student", "kl_student_teacher", "jsd", "mse"):
        assert torch.equal(getattr(found, name), torch.zeros(4))
    assert torch.equal(found.sqnr_db, torch.full((4,), math.inf)) and torch.equal(found.top1_agree, torch.ones(4))
    assert found.ce_teacher is None and found.ce_student is None


def test_huge_logits(tier):
    for teacher, student in (
        (1e4 * torch.randn(4, 777), 1e4 * torch.randn(4, 777)),
        (torch.randn(4, 777), 1e4 * torch.randn(4, 777)),
    ):
        assert_matches(klfast.logit_divergence(teacher, student), truth(teacher, student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", SIZES)
def test_half_precision_and_mixed_dtypes(tier, dtype, vocab):
    teacher, student = (3 * torch.randn(3, vocab)).to(dtype), (3 * torch.randn(3, vocab)).to(dtype)
    targets = torch.randint(0, vocab, (3,))
    for a, b in ((teacher, student), (teacher, student.float()), (teacher.float(), student)):
        assert_matches(klfast.logit_divergence(a, b, targets), truth(a, b, targets))


def test_strides_and_leading_dimensions(tier):
    storage = torch.full((2, 3, 230), math.nan)
    teacher, student = storage[:, :, 1:101], torch.randn(100, 3, 2).permute(2, 1, 0)
    teacher.copy_(torch.randn(2, 3, 100))
    targets = torch.randint(0, 100, (3, 2)).T
    found = klfast.logit_divergence(teacher, student, targets)
    assert found.jsd.shape == (6,)
    assert_matches(found, truth(teacher.reshape(6, 100), student.reshape(6, 100), targets.reshape(6)))


def test_ties_go_to_the_lowest_index(tier):
    teacher, student = torch.zeros(2, 5000), torch.zeros(2, 5000)
    teacher[:, [4, 4000]] = 1
    student[0, [4, 4500]] = 1
    student[1, [17, 4000]] = 1
    assert klfast.logit_divergence(teacher, student).top1_agree.tolist() == [1.0, 0.0]


def test_no_tokens(tier):
    found = klfast.logit_divergence(torch.empty(0, 10), torch.empty(0, 10), torch.empty(0, dtype=torch.int64))
    assert all(getattr(found, name).shape == (0,) for name in FIELDS)
    head = torch.randn(10, 4)
    for leading in ((0,), (3, 0), (0, 2)):
        teacher = torch.empty(*leading[-1:], 4)
        assert klfast.linear_divergence(teacher, head, torch.empty(*leading, 4), head).jsd.shape == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_not_finite(tier, value, who):
    logits = {"teacher": torch.randn(5, 3000), "student": torch.randn(5, 3000)}
    logits[who][3, 2900] = value
    with pytest.raises(InvalidInputError, match=f"the {who}'s logit of token 3, vocabulary entry 2900, is a NaN"):
        klfast.logit_divergence(logits["teacher"], logits["student"])
    hidden = {"teacher": torch.randn(5, 4), "student": torch.randn(5, 4)}
    head = {"teacher": torch.randn(3000, 4), "student": torch.randn(3000, 4)}
    head[who][2900, 1] = value
    with pytest.raises(InvalidInputError, match=f"the {who}'s logit of token 0, vocabulary entry 2900, is a NaN"):
        klfast.linear_divergence(hidden["teacher"], head["teacher"], hidden["student"], head["student"])


def test_bad_input():
    a, h, w = torch.randn(3, 10), torch.randn(3, 4), torch.randn(10, 4)
    for bad, message in (
        (lambda: klfast.logit_divergence(a, a.double()), "student logits must be float32"),
        (lambda: klfast.logit_divergence(a, a[:2]), "must have one shape"),
        (lambda: klfast.logit_divergence(a[:, :0], a[:, :0]), "V at least 1"),
        (lambda: klfast.logit_divergence(a, a, torch.zeros(3)), "targets must be int64"),
        (lambda: klfast.logit_divergence(a, a, torch.zeros(2, dtype=torch.int64)), r"targets must have shape \[3\]"),
        (lambda: klfast.logit_divergence(a, a, torch.tensor([0, 10, 1])), "targets must be in 0..9"),
        (lambda: klfast.logit_divergence(a, a, torch.tensor([0, -1, 1])), "got -1"),
        (lambda: klfast.logit_divergence(a, a.to("meta")), "one device"),
        (lambda: klfast.logit_divergence(torch.zeros(()), torch.zeros(())), "V at least 1"),
        (
            lambda: klfast.logit_divergence(a[None], a[None], torch.zeros(3, dtype=torch.int64)),
            r"targets must have shape \[1, 3\]",
        ),
        (lambda: torch.ops.klfast.logit_divergence(a[None], a[None], None), r"logits must be \[T, V\]"),
        (lambda: torch.ops.klfast.logit_divergence(a[0], a[0], None), r"logits must be \[T, V\]"),
        (lambda: klfast.linear_divergence(h[:, :0], w[:, :0], h, w), "teacher's hidden states must be .* H at least 1"),
        (lambda: klfast.linear_divergence(h, w, h[:, :0], w[:, :0]), "student's hidden states must be .* H at least 1"),
        (lambda: klfast.linear_divergence(h, w[:, :3], h, w), "teacher's hidden states must be"),
        (lambda: klfast.linear_divergence(h, w, h, w[:9]), "same number of rows"),
        (lambda: klfast.linear_divergence(h, w, h[:2], w), "must end in the teacher's"),
        (lambda: klfast.linear_divergence(h, klfast.quantize(w, QuantSpec()), h[:, :2], w), "student's hidden states"),
        (lambda: klfast.linear_divergence(h, w, h[:, :2], klfast.quantize(w, QuantSpec())), r"must be \[..., 4\]"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            bad()


@pytest.mark.parametrize("vocab", [5, 1024, 2600])
@pytest.mark.parametrize("students", [1, 3])
def test_linear_equals_logits(tier, vocab, students):
    teacher, head = torch.randn(7, 24), torch.randn(vocab, 24)
    student = teacher + 0.1 * torch.randn(students, 7, 24)
    targets = torch.randint(0, vocab, (7,))
    expected = truth((teacher @ head.T).repeat(students, 1), (student @ head.T).flatten(0, 1), targets.repeat(students))
    assert_matches(klfast.linear_divergence(teacher, head, student, head, targets), expected, rtol=1e-4)
    if students == 1:
        assert_matches(klfast.linear_divergence(teacher, head, student[0], head, targets), expected, rtol=1e-4)


def test_linear_with_targets_per_student_and_more_tokens_than_a_block(tier):
    teacher, head = torch.randn(2, 150, 8), torch.randn(1100, 8)
    student, targets = teacher + torch.randn(2, 2, 150, 8), torch.randint(0, 1100, (2, 2, 150))
    expected = truth(
        (teacher @ head.T).repeat(2, 1, 1).flatten(0, 1), (student @ head.T).flatten(0, 2), targets.flatten()
    )
    assert_matches(klfast.linear_divergence(teacher, head, student, head, targets), expected, rtol=1e-3)


@pytest.mark.parametrize("spec", [QuantSpec(4, 8, True), QuantSpec(4, 7, False), QuantSpec(8, -1, False)], ids=str)
@pytest.mark.parametrize("vocab", [13, 2053])
def test_quantized_heads(tier, spec, vocab):
    hidden, head = torch.randn(4, 20), torch.randn(vocab, 20)
    qt = klfast.quantize(head, spec)
    dequantized = hidden @ qt.dequantize(torch.float32).T
    assert_matches(klfast.linear_divergence(hidden, head, hidden, qt), truth(hidden @ head.T, dequantized), rtol=1e-3)
    assert_matches(klfast.linear_divergence(hidden, qt, hidden, head), truth(dequantized, hidden @ head.T), rtol=1e-3)


def test_half_precision_heads_lose_nothing(tier):
    """Products and sums are float32 for all operands: a bfloat16 GEMM's rounding would show as 1e-5 nats."""
    hidden, head = torch.randn(6, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    found = klfast.linear_divergence(hidden, head, hidden.float(), head.float())
    assert found.kl_teacher_student.max() < 1e-11
    different = klfast.linear_divergence(torch.randn(6, 48), torch.randn(500, 48), hidden, head)  # another width
    assert different.jsd.shape == (6,)


@pytest.mark.parametrize("spec", [None, QuantSpec(4, 32), QuantSpec(4, 15, False), QuantSpec(8, -1, False)], ids=str)
def test_bfloat16_operands_lose_nothing(tier, spec):
    """The CPU may multiply bfloat16 and integers natively; sums stay in float32, not rounded to bfloat16."""
    hidden, head = torch.randn(2, 150, 75).bfloat16(), (torch.randn(1103, 75) / 4).bfloat16()
    student = (hidden.float() + 1e-2 * torch.randn(2, 150, 75)).bfloat16()
    other = (head.float() + 1e-3 * torch.randn(1103, 75)).bfloat16()
    s_head = other if spec is None else klfast.quantize(other.float(), spec)
    dense = (other if spec is None else s_head.dequantize(torch.float32)).double()
    expected = truth(hidden.double() @ head.double().T, student.double() @ dense.T)
    assert_matches(
        klfast.linear_divergence(hidden, head, student, s_head),
        {name: value.flatten() for name, value in expected.items()},
        rtol=1e-3,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_of_one_model_with_itself_is_exactly_zero(tier, dtype):
    hidden, head = torch.randn(300, 16).to(dtype), torch.randn(1500, 16).to(dtype)
    assert (
        klfast.linear_divergence(hidden, head, hidden.expand(2, 300, 16), head.clone()).kl_teacher_student.abs().max()
        == 0
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_alone_has_its_logits_made_once(quantized, monkeypatch):
    hidden, weight = torch.randn(2, 5, 24).bfloat16(), torch.randn(2600, 24)
    targets = torch.randint(0, 2600, (2, 5))
    head, copied = (klfast.quantize(weight, QuantSpec(4, 8)) if quantized else weight.clone() for _ in range(2))
    products, logits = [], cpu_divergence.block_logits
    monkeypatch.setattr(cpu_divergence, "block_logits", lambda *args: products.append(args) or logits(*args))
    alone = klfast.linear_divergence(hidden, head, hidden, head, targets)
    once = len(products)
    pair = klfast.linear_divergence(hidden, head, hidden.clone(), copied, targets)
    assert len(products) == 3 * once > 0
    assert torch.equal(alone.ce_student, pair.ce_student) and torch.equal(alone.ce_student, alone.ce_teacher)
    assert alone.kl_teacher_student.abs().max() == 0 and (alone.top1_agree == 1).all()


def test_thread_count_changes_nothing(tier):
    teacher = torch.randn(33, 3000)
    student = teacher + 0.3 * torch.randn(33, 3000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(torch.ops.klfast.logit_divergence(teacher, student, torch.zeros(33, dtype=torch.int64)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(1, 400),
    scale=st.floats(0, 50),
    noise=st.floats(-7, 2),
    shift=st.floats(-30, 30),
)
def test_never_negative(seed, vocab, scale, noise, shift):
    generator = torch.Generator().manual_seed(seed)
    teacher = scale * torch.randn(4, vocab, generator=generator)
    student = teacher + 10**noise * torch.randn(4, vocab, generator=generator) + shift
    for name in pins.available_tiers():
        with klfast.using(name):
            found = klfast.logit_divergence(teacher, student)
        for metric in (found.kl_teacher_student, found.kl_student_teacher, found.jsd, found.mse):
            assert (metric >= 0).all() and metric.isfinite().all()
        assert (found.jsd <= math.log(2) + 1e-6).all()


def test_opcheck(tier):
    teacher, targets = torch.randn(3, 40), torch.randint(0, 40, (3,))
    torch.library.opcheck(torch.ops.klfast.logit_divergence.default, (teacher, teacher + 0.1, targets))
    hidden, head = torch.randn(3, 8), torch.randn(40, 8)
    qt = klfast.quantize(head, QuantSpec(4, 4, False))
    torch.library.opcheck(
        torch.ops.klfast.linear_divergence.default,
        (
            hidden,
            [head],
            hidden.expand(2, 3, 8).clone(),
            list(qt.parts),
            targets,
            40,
            "",
            "",
            40,
            str(qt.spec),
            "plain",
        ),
    )


def test_gpus_without_the_extension_have_no_divergence_kernels():
    """The extension computes the metrics from those kernels' results."""
    pytest.importorskip("triton")
    code = (
        "import sys; sys.modules['klfast._C'] = None\n"
        "import klfast.ops; from klfast.dispatch import registry\n"
        "print([registry.has_kernel(name, 'CUDA') for name in ('logit_divergence', 'linear_divergence', 'rms_norm')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[False, False, True]", done.stderr
