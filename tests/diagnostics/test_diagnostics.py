"""klfast.explain and klfast.doctor."""

import json
import platform
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

OPS = registry.op_names()


def test_doctor_checks_every_op_at_every_tier_and_passes():
    report = klfast.doctor()
    assert [(c.op, c.tier) for c in report.checks] == [
        (op, tier) for op in registry.op_names() for tier in pins.available_tiers()
    ]
    assert report.passed, str(report)
    assert report.versions["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert list(report.tiers) == list(pins.CPU_TIERS) and report.tiers["scalar"] == ""
    assert json.loads(json.dumps(report.as_dict()))["passed"] is True
    for word in (*registry.op_names(), *pins.CPU_TIERS, "All is well."):
        assert word in str(report)


@pytest.fixture
def two_ops(monkeypatch):
    """Let the doctor check no others, which takes seconds."""
    monkeypatch.setattr(registry, "op_names", lambda: ["dequant_matmul", "rms_norm"])


@pytest.mark.usefixtures("two_ops")
@pytest.mark.parametrize("wrong", [torch.full((2,), float("nan")), torch.tensor([1.0, 2.001])])
def test_doctor_finds_a_wrong_kernel(monkeypatch, wrong):
    right = torch.tensor([1.0, 2.0])

    def call():
        return [right, right if pins.pinned() == "reference" else wrong]

    case = op_cases.Case("dequant_matmul", "two numbers", 1e-4, call)
    monkeypatch.setitem(op_cases.CASES, "dequant_matmul", lambda _: [case])
    report = klfast.doctor()
    assert not report.passed
    assert {c.op for c in report.checks if not c.passed} == {"dequant_matmul"}
    assert "Something is wrong" in str(report)


@pytest.mark.usefixtures("two_ops")
def test_doctor_reports_an_op_that_cannot_run(monkeypatch):
    def fail(_):
        raise AttributeError("no such kernel")

    monkeypatch.setitem(op_cases.CASES, "dequant_matmul", fail)
    report = klfast.doctor()
    failed = {(c.op, c.message) for c in report.checks if not c.passed}
    assert failed == {("dequant_matmul", "AttributeError: no such kernel")}


@pytest.mark.parametrize("op", OPS)
def test_explain_names_the_tier_that_runs_and_a_reason_for_each_other(op):
    found = klfast.explain(op)
    assert found.chosen not in found.rejected
    assert {found.chosen, *found.rejected} == set(pins.IMPLEMENTATIONS)
    assert all(reason.endswith(".") for reason in found.rejected.values())
    assert all(f"not {tier}: {reason}" in str(found) for tier, reason in found.rejected.items())


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
    """Linear leaves some matmuls to torch; ``explain`` must agree with the implementation that ran."""
    from klfast.backends.cpu import matmul as cpu

    ran = []

    def recorded(name, function):
        def call(*args, **named):
            ran.append(name)
            return function(*args, **named)

        return call

    monkeypatch.setattr(cpu.F, "linear", recorded("torch", torch.nn.functional.linear))
    monkeypatch.setattr(cpu, "linear_into", recorded("klfast", cpu.linear_into))
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


@pytest.mark.parametrize("isa", pins.available_tiers())
@pytest.mark.parametrize("op", OPS)
def test_explain_takes_the_tier_from_the_kernel_tables(op, isa):
    with klfast.using(isa):
        assert klfast.explain(op).chosen == pins.CPU_TIERS[_C.best_tier(op, pins.CPU_TIERS.index(isa))]


@pytest.mark.parametrize(
    "function",
    [klfast.causal_conv1d_fn, klfast.selective_scan_fn, klfast.mamba_chunk_scan_combined, klfast.logit_divergence],
    ids=lambda function: function.__name__,
)
def test_explain_knows_the_public_functions(function):
    assert klfast.explain(function).chosen in pins.available_tiers()


def test_explain_unknown_op():
    with pytest.raises(InvalidInputError, match=r"no op 'matmul'.*dequant_matmul"):
        klfast.explain("matmul")


def test_cpu_name_without_proc(monkeypatch):
    def fail(*_, **__):
        raise OSError

    monkeypatch.setattr(machine.Path, "read_text", fail)
    assert machine.cpu_name() == (platform.processor() or platform.machine())
