"""klfast.explain and klfast.doctor."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import klfast
from klfast import _C, ops
from klfast.benchkit import op_cases
from klfast.core import machine
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins, registry


def test_doctor_checks_every_op_at_every_tier_and_passes():
    report = klfast.doctor()
    assert [(c.op, c.tier) for c in report.checks] == [
        (op, tier) for op in registry.op_names() for tier in pins.available_tiers()
    ]
    assert report.passed, str(report)
    assert report.versions["torch"] == torch.__version__.split("+")[0] or report.versions["torch"] == torch.__version__
    assert list(report.tiers) == list(pins.CPU_TIERS) and report.tiers["scalar"] == ""
    assert json.loads(json.dumps(report.as_dict()))["passed"] is True
    for word in (*registry.op_names(), *pins.CPU_TIERS, "All is well."):
        assert word in str(report)


@pytest.mark.parametrize("wrong", [torch.full((2,), float("nan")), torch.tensor([1.0, 2.001])])
def test_doctor_finds_a_wrong_kernel(monkeypatch, wrong):
    right = torch.tensor([1.0, 2.0])
    case = op_cases.Case(
        "dequant_matmul", "two numbers", 1e-4, lambda: [right, right if pins.pinned() == "reference" else wrong]
    )
    monkeypatch.setitem(op_cases.CASES, "dequant_matmul", lambda _: [case])
    report = klfast.doctor()
    assert not report.passed
    assert {c.op for c in report.checks if not c.passed} == {"dequant_matmul"}
    assert "Something is wrong" in str(report)


def test_doctor_reports_an_op_that_cannot_run(monkeypatch):
    monkeypatch.setitem(
        op_cases.CASES, "dequant_matmul", lambda _: (_ for _ in ()).throw(AttributeError("no such kernel"))
    )
    report = klfast.doctor()
    assert {(c.op, c.message) for c in report.checks if not c.passed} == {
        ("dequant_matmul", "AttributeError: no such kernel")
    }


def test_explain_names_the_tier_that_runs_and_a_reason_for_each_other():
    for op in registry.op_names():
        found = klfast.explain(op)
        assert found.chosen not in found.rejected
        assert {found.chosen, *found.rejected} == set(pins.IMPLEMENTATIONS)
        assert all(reason.endswith(".") for reason in found.rejected.values())
    for tier, reason in found.rejected.items():
        assert f"not {tier}: {reason}" in str(found)


def test_explain_honours_pins():
    with klfast.using("reference"):
        assert klfast.explain(klfast.dequant_matmul).chosen == "reference"
    with klfast.using("scalar"):
        found = klfast.explain("dequant_matmul", torch.empty(1))
    assert found.chosen in ("scalar", "reference")
    assert all("asks for scalar" in found.rejected[t] or "no " in found.rejected[t] for t in pins.available_tiers()[1:])


def test_explain_goes_by_the_device_of_the_arguments():
    found = klfast.explain("dequant_matmul", torch.empty(1, device="meta"))
    assert found.chosen == "reference"
    assert found.rejected["scalar"] == "the tensors are on meta."


@pytest.mark.parametrize("pin", [None, "reference", *pins.available_tiers()])
@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_explain_of_linear_is_what_runs(rows, dtype, out, pin, monkeypatch):
    """linear leaves some products to torch: what ran is recorded and compared."""
    from klfast.backends.cpu import matmul as cpu

    ran = []
    monkeypatch.setattr(
        cpu.F, "linear", lambda *args, right=torch.nn.functional.linear: [ran.append("torch"), right(*args)][1]
    )
    monkeypatch.setattr(
        cpu,
        "linear_into",
        lambda *args, right=cpu.linear_into, **named: [ran.append("klfast"), right(*args, **named)][1],
    )
    x, weight = torch.randn(rows, 24).to(dtype), torch.randn(16, 24).to(dtype)
    with nullcontext() if pin is None else klfast.using(pin):
        ops.linear(x, weight, dtype=out)
        found = klfast.explain("linear", x, weight, None, out)
    if pin == "reference":
        assert found.chosen == "reference"
    else:
        assert ran == ["torch" if found.chosen == "torch" else "klfast"]
    assert {found.chosen, *found.rejected} - {"torch"} == set(pins.IMPLEMENTATIONS)
    assert all(reason.endswith(".") for reason in found.rejected.values())
    if found.chosen == "torch":
        assert found.rejected["reference"].startswith("torch's own product is faster")


def test_explain_of_linear_on_a_gpu_is_torch():
    with FakeTensorMode():
        x = torch.empty(3, 4, device="cuda")
    assert klfast.explain("linear", x).chosen == "torch"
    assert klfast.explain("rms_norm", x).chosen in ("triton", "reference")


def test_explain_takes_the_tier_from_the_kernel_tables():
    for op in registry.op_names():
        for tier in pins.available_tiers():
            with klfast.using(tier):
                assert klfast.explain(op).chosen == pins.CPU_TIERS[_C.best_tier(op, pins.CPU_TIERS.index(tier))]


def test_explain_knows_the_public_functions():
    for function in (
        klfast.causal_conv1d_fn,
        klfast.selective_scan_fn,
        klfast.mamba_chunk_scan_combined,
        klfast.logit_divergence,
    ):
        assert klfast.explain(function).chosen in pins.available_tiers()


def test_explain_unknown_op():
    with pytest.raises(InvalidInputError, match="no op 'matmul'.*dequant_matmul"):
        klfast.explain("matmul")


def test_cpu_name_without_proc(monkeypatch):
    monkeypatch.setattr(machine.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert machine.cpu_name()
