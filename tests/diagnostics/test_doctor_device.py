"""klfast doctor --device, on the CPU with its real kernels and stand-ins for what only GPUs have."""

import errno
import itertools
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from klfast.bench import test_linear
from typer.testing import CliRunner

from klfast import ops
from klfast.benchkit import clock as timing
from klfast.benchkit import device_facts, op_cases
from klfast.benchkit.clock import Clock
from klfast.benchkit.runner import Contender, Group, UnavailableError
from klfast.cli import app
from klfast.core import errors, machine
from klfast.diagnostics import device_bench, device_report, kernel_checks
from klfast.dispatch import pins, registry

KERNELS = [
    *(f"dequant_matmul int{bits} {activation}" for bits in (4, 6, 8) for activation in ("exact", "int8")),
    *(op for op in registry.op_names() if op != "dequant_matmul"),
]
FACTS = ["klfast", "torch", "triton", "transformers", "python", "OS", "cpu", "cores", "tiers", "extension", "device"]


def doctor(*arguments, code=0):
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def break_conv(monkeypatch, fault):
    """Replace the result of causal_conv1d's kernel, not of its reference, by ``fault`` of it."""
    right = ops.causal_conv1d_fn

    def wrong(*args, **more):
        out, state = right(*args, **more)
        return (out, state) if pins.pinned() == "reference" else (fault(out), state)

    monkeypatch.setattr(ops, "causal_conv1d_fn", wrong)


def checked(op, device="cpu"):
    return list(kernel_checks.of_op(op, device, lambda _: None))


def raising(*_, **__):
    raise RuntimeError("ptxas\n  gave up")


def test_every_kernel_passes_and_the_file_holds_the_output(tmp_path):
    result = doctor("--device", "cpu", "--seconds", 0, "--out", tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_text() == result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]
    lines = result.stdout.splitlines()
    for kernel in KERNELS:
        assert any(line.startswith(f"pass  {kernel} ") for line in lines), kernel
    for fact in FACTS:
        assert any(line.startswith(f"  {fact}: ") for line in lines), fact
    assert lines[-1] == "All kernels passed." and "Median" not in result.stdout


def test_cases_have_every_dtype_format_and_number_of_rows():
    dtypes, groups, activations = ("float32", "float16", "bfloat16"), ("g32-sym", "g64-asym"), ("exact", "int8")
    wanted = {
        (f"dequant_matmul int{bits} {activation}", f"{dtype} [{rows}, 331] x int{bits}-{group} [67, 331]")
        for dtype, rows, bits, group, activation in itertools.product(
            dtypes, (1, 5, 33, 70), (4, 6, 8), groups, activations
        )
    }
    assert wanted <= {(case.kernel, case.what) for case in op_cases.cases("dequant_matmul")}
    for op in registry.op_names():
        assert {case.what.split()[0] for case in op_cases.cases(op)} == {"float32", "float16", "bfloat16"}


LAUNCHES = """
import torch
from klfast.dispatch import pins
from klfast.benchkit import op_cases
from klfast.diagnostics import op_checks
from klfast.kernels import launch
from klfast.kernels.launch import Launch

launch.cores = lambda _: 4  # as on a small GPU
launched, run = [], Launch.run

def noted(launch):
    launched.append(f"{launch.kernel.fn.__name__} {launch.grid[-1]}")
    run(launch)

Launch.run = noted
for op, words in (
    ("mamba_chunk_scan", "4, 32], "),
    ("decode_attention", "2000 keys"),
    ("logit_divergence", "20000]"),
    ("logit_divergence", "misleading"),
    ("dequant_matmul", "2048]"),
):
    for case in op_cases.cases(op, (torch.float16,)):
        if words in case.what:
            launched.clear()
            outcome = op_checks.run([case], "triton")
            print(" | ".join([case.kernel, ", ".join(launched), *outcome.faults]))
"""


@pytest.mark.slow
def test_cases_reach_the_kernels_for_larger_sizes():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LAUNCHES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.split(" | ") for line in done.stdout.splitlines()]
    assert not [line for line in found if line[2:]], done.stdout
    launches = {kernel: [names.split(", ") for name, names, *_ in found if name == kernel] for kernel, *_ in found}
    names = {kernel: [[one.split()[0] for one in launch] for launch in some] for kernel, some in launches.items()}
    assert names["mamba_chunk_scan"] == 4 * [["ssd_states", "ssd_outputs"]]
    assert all(some == ["decode_attention", "combine_parts"] for some in names["decode_attention"])
    parts, again = launches["logit_divergence"][0], launches["logit_divergence"][-1]
    assert parts == ["first_anchors 1", "divergence_sums 10"], "parts of the vocabulary"
    assert again == ["first_anchors 3", "divergence_sums 3", "divergence_sums 3"], "rows run again"
    for kernel in ("dequant_matmul int4 exact", "dequant_matmul int4 int8"):
        assert len(launches[kernel]) == 3 and all(names[-1].startswith("split_sum") for names in launches[kernel])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda y: y + 0.1, "exceeds the tolerance"),
        (lambda y: y * torch.nan, "error nan exceeds the tolerance"),
        (lambda y: y[:1], "instead of float32 [2, 19, 33]"),
        (lambda y: y.double(), "float64 [2, 19, 33] instead of float32"),
        (raising, "RuntimeError: ptxas gave up"),
    ],
)
def test_broken_kernel_is_named(monkeypatch, fault, says):
    break_conv(monkeypatch, fault)
    (found,) = checked("causal_conv1d")
    assert found.status == kernel_checks.FAIL and str(found).startswith("FAIL  causal_conv1d ") and says in str(found)


def test_other_kernels_are_still_checked(monkeypatch):
    break_conv(monkeypatch, raising)
    monkeypatch.setattr(registry, "op_names", lambda: ["rms_norm", "causal_conv1d", "linear"])
    result = doctor("--device", "cpu", "--seconds", 0, code=1)
    assert "FAIL  causal_conv1d " in result.stdout
    assert "1 of 3 kernels failed: causal_conv1d" in result.stdout
    assert result.stdout.count("\npass ") == 2
    assert result.stderr == "klfast: a check failed; see the report\n"


def test_cases_that_cannot_be_made_fail(monkeypatch):
    monkeypatch.setitem(op_cases.CASES, "rms_norm", raising)
    (found,) = checked("rms_norm")
    assert found.status == kernel_checks.FAIL and "cannot be made: RuntimeError: ptxas gave up" in str(found)


def test_falling_back_fails(monkeypatch):
    break_conv(monkeypatch, lambda _: pins.slow_path("causal_conv1d", [1], "there is none for this device."))
    (found,) = checked("causal_conv1d")
    assert found.status == kernel_checks.FAIL and "SlowPathWarning: causal_conv1d [1] runs the slow" in str(found)


@pytest.mark.parametrize(
    ("op", "device", "status"),
    [
        ("decode_attention", "cpu", kernel_checks.FAIL),
        ("selective_scan", "xpu", kernel_checks.FAIL),
        ("linear", "xpu", kernel_checks.NONE),
    ],
)
def test_op_without_a_kernel(monkeypatch, op, device, status):
    """On the CPU every op needs one, on a GPU every op with a Triton kernel."""
    monkeypatch.setattr(registry, "has_kernel", lambda *_: False)
    (found,) = checked(op, device)
    assert found.status == status and f"klfast has no {device} kernel of this op." in str(found)


def test_checks_in_another_process():
    told = []
    found = kernel_checks.in_a_process("rms_norm", "rms_norm", "cpu", told.append)
    assert found == kernel_checks.of_kernel("rms_norm", op_cases.cases("rms_norm"), "cpu", lambda _: None)
    assert found.status == kernel_checks.PASS
    assert told == [f"rms_norm, {case.what}" for case in op_cases.cases("rms_norm")]


WRITES = "import os, sys, time; print('hello'); print('{\"now\": \"case 7\"}', flush=True); "


def test_process_that_ends_early_fails_only_its_kernel(monkeypatch):
    """As on a GPU: two kernels crash their processes, the next one passes."""
    right = kernel_checks.command
    broken = {
        "causal_conv1d": WRITES
        + "print('first\\n\\n an illegal memory access \\n', file=sys.stderr, flush=True); os._exit(3)",
        "rms_norm": "import os; os.kill(os.getpid(), 9)",
    }
    monkeypatch.setattr(
        kernel_checks,
        "command",
        lambda op, kernel, _: [sys.executable, "-c", broken[op]] if op in broken else right(op, kernel, "cpu"),
    )
    monkeypatch.setattr(registry, "op_names", lambda: [*broken, "decode_attention"])
    monkeypatch.setattr(registry, "has_kernel", lambda *_: True)
    monkeypatch.setattr(machine, "require", lambda _: None)
    monkeypatch.setattr(device_facts, "gather", lambda _: {})
    lines = []
    found = device_report.run("xpu", 0, None, lines.append)
    assert found.failed == list(broken) and found.checks[-1].status == kernel_checks.PASS
    assert [check.reason for check in found.checks[:2]] == [
        "its process ended with exit code 3 in the case of case 7: an illegal memory access",
        "its process ended with exit code -9: it said nothing",
    ]
    assert lines[-1] == "\n2 of 3 kernels failed: causal_conv1d, rms_norm"


def test_process_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(kernel_checks, "PATIENCE", 1.0)
    monkeypatch.setattr(kernel_checks, "command", lambda *_: [sys.executable, "-c", WRITES + "time.sleep(100)"])
    found = kernel_checks.in_a_process("rms_norm", "rms_norm", "xpu", lambda _: None)
    assert found.status == kernel_checks.FAIL
    assert found.reason == "its process ended with exit code -9 in the case of case 7: it said nothing"


@pytest.mark.parametrize("short", [1, 2])
def test_lack_of_room_for_a_process_is_not_a_fault_of_the_kernel(short, monkeypatch):
    """The process is tried twice."""
    right, left = subprocess.Popen, [short]

    def popen(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return right(*args, **kwargs)

    monkeypatch.setattr(kernel_checks, "PAUSE", 0.0)
    monkeypatch.setattr(kernel_checks.subprocess, "Popen", popen)
    found = kernel_checks.in_a_process("rms_norm", "rms_norm", "cpu", lambda _: None)
    if short == 1:
        assert found.status == kernel_checks.PASS
    else:
        assert found.status == kernel_checks.FAIL and found.reason.startswith(
            "not checked, since the machine has no room for another process; try again later ("
        )


def test_process_that_cannot_start_threads_is_tried_again(monkeypatch, tmp_path):
    message = "libgomp: Thread creation failed: Resource temporarily unavailable"
    code = f"import os, sys; os.mkdir({str(tmp_path / 'tried')!r}); sys.exit({message!r})"
    right = kernel_checks.command
    monkeypatch.setattr(kernel_checks, "PAUSE", 0.0)
    monkeypatch.setattr(
        kernel_checks,
        "command",
        lambda *args: right(*args) if (tmp_path / "tried").exists() else [sys.executable, "-c", code],
    )
    assert kernel_checks.in_a_process("rms_norm", "rms_norm", "cpu", lambda _: None).status == kernel_checks.PASS


def test_json(monkeypatch):
    break_conv(monkeypatch, raising)
    data = json.loads(doctor("--device", "cpu", "--seconds", 0, "--json", code=1).stdout)
    assert data["passed"] is False
    assert [c["kernel"] for c in data["checks"] if c["status"] == "FAIL"] == ["causal_conv1d"]


def test_interrupted_run_leaves_its_findings(monkeypatch, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    break_conv(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        device_report.run("cpu", 0, tmp_path / "report.txt", lambda _: None)
    text = (tmp_path / "report.txt").read_text()
    assert "pass  logit_divergence" in text and text.endswith(
        "(causal_conv1d, float32 [2, 19, 1] is running; if nothing follows, it ended the run)\n"
    )


def test_missing_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "xpu", None, raising=False)
    result = doctor("--device", "xpu", "--out", tmp_path / "report.txt", code=1)
    assert result.stdout == "" and result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    assert "pip install torch --index-url https://download.pytorch.org/whl/xpu" in result.stderr
    monkeypatch.setattr(torch.version, "xpu", "20250301")
    assert "finds no xpu device; Intel's GPU driver" in doctor("--device", "xpu", code=1).stderr


def test_wrong_usage(tmp_path):
    doctor("--device", "tpu", code=2)
    doctor("--seconds", 3, code=2)
    doctor("--out", tmp_path / "report.txt", code=2)
    (tmp_path / "report.txt").write_text("mine")
    assert "exists" in doctor("--device", "cpu", "--out", tmp_path / "report.txt", code=1).stderr
    assert (tmp_path / "report.txt").read_text() == "mine"


def test_facts_of_an_accelerator(monkeypatch):
    properties = SimpleNamespace(
        name="Arc", driver_version="1.6", sub_group_sizes=[16, 32], uuid="secret", pci_bus_id=3, _hidden=1, method=print
    )
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda: "Intel(R) Arc(TM) Graphics")
    monkeypatch.setattr(torch.xpu, "mem_get_info", raising)
    monkeypatch.setenv("ZE_AFFINITY_MASK", "0")
    found = device_facts.gather("xpu")
    assert found["driver_version"] == "1.6" and found["sub_group_sizes"] == "[16, 32]"
    assert found["device name"] == "Intel(R) Arc(TM) Graphics"
    assert found["free and total memory, bytes"] == "RuntimeError: ptxas gave up" and found["ZE_AFFINITY_MASK"] == "0"
    assert not {"uuid", "pci_bus_id", "_hidden", "method"} & set(found)


def test_long_errors_are_elided_in_the_middle():
    line = errors.one_line(ValueError("first\n" + 1000 * "x" + "\nlast"))
    assert line.startswith("ValueError: first x") and line.endswith("x last") and len(line) <= 410 and "\n" not in line


def test_bench_has_float16_and_torch_int4_beside_klfast():
    groups = {group.name: list(group.contenders) for group in device_bench.groups("xpu")}
    assert groups["linear 2048x8192, M=1"] == ["klfast int4 exact", "klfast int4 int8", "torch fp16", "torch int4pack"]
    assert len(groups) < 25
    assert all(names[0].startswith("klfast") and len(names) > 1 for names in groups.values())


def test_report_with_a_bench(monkeypatch):
    monkeypatch.setattr(device_bench, "SHAPES", ((96, 64),))
    monkeypatch.setattr(device_bench, "ROWS", (1, 5))
    monkeypatch.setattr(device_bench, "SUITES", {"linear": test_linear})
    monkeypatch.setattr(device_bench, "WORKING_SET", 10_000)
    monkeypatch.setattr(device_bench, "PATIENCE", 1000)
    lines = []
    found = device_report.run("cpu", 0.05, None, lines.append)
    assert [row.group for row in found.bench] == 4 * ["linear 96x64, M=1"] + 4 * ["linear 96x64, M=5"]
    for row in found.bench:
        assert not row.note and row.seconds > 0 and row.error < 0.05 and row.speedup > 0, row
    assert "Median times by clock" in "\n".join(lines) and "    klfast int4 exact " in "\n".join(lines)


def test_bench_gives_no_figure_for_wrong_or_failing_contenders(monkeypatch):
    monkeypatch.setattr(device_bench, "PATIENCE", 1000)  # for busy machines

    def contender(error):
        return lambda: Contender([lambda: None], lambda: error, 1e-3)

    def unavailable():
        raise UnavailableError("not on this device")

    made = {
        "off": contender(0.1),
        "nan": contender(float("nan")),
        "raises": raising,
        "none": unavailable,
        "klfast": contender(0.0),
        "torch": contender(0.0),
    }
    later = {"torch": lambda: Contender([raising], lambda: 0.0, 0.0)}
    groups = [Group("one", {}, made), Group("two", {}, {"klfast": contender(0.0)}), Group("three", {}, later)]
    found = {(row.group, row.contender): row for rows in device_bench.run(groups, Clock("cpu"), 0.02) for row in rows}
    notes = {
        "off": "wrong: error 1.0e-01 exceeds the tolerance 1e-03",
        "nan": "wrong: error nan exceeds the tolerance 1e-03",
        "raises": "fails: RuntimeError: ptxas gave up",
        "none": "not on this device",
    }
    for name, note in notes.items():
        row = found["one", name]
        assert note in str(row) and row.seconds != row.seconds and " ms" not in str(row)
    assert found["one", "klfast"].speedup > 0 and "1.00x " in str(found["one", "torch"])
    assert found["two", "klfast"].seconds > 0 and "x " not in str(found["two", "klfast"])  # nothing to compare with
    assert "fails when timed: RuntimeError" in str(found["three", "torch"])


def test_bench_ends_in_time():
    ((row,),) = device_bench.run([Group("one", {}, {"torch": raising})], Clock("cpu"), -1.0)
    assert row.note == "skipped, the time is over"


def test_clock_without_events(monkeypatch):
    synchronized = []
    monkeypatch.setattr(torch.xpu, "synchronize", lambda: synchronized.append(1))
    monkeypatch.setattr(torch.xpu, "Event", raising)
    clock = Clock("xpu")
    assert clock.by == "clock, the device synchronized"
    assert clock.seconds(lambda: None) >= 0 and len(synchronized) == 2


class Gpu:
    """A GPU as a clock sees it: milliseconds pass while it works, one for each addition to a block."""

    def __init__(self, monkeypatch):
        self.milliseconds, self.blockers = 0.0, 0
        monkeypatch.setattr(torch.xpu, "synchronize", lambda: None)
        monkeypatch.setattr(torch.xpu, "Event", self.event)
        monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(add_=self.block))

    def event(self, enable_timing):
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.milliseconds)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def block(self, _):
        self.blockers += 1
        self.milliseconds += 1

    def work(self, milliseconds, launch=0.0):
        def call():
            time.sleep(launch)
            self.milliseconds += milliseconds

        return call


def test_clock_by_events(monkeypatch):
    gpu = Gpu(monkeypatch)
    clock = Clock("xpu")
    assert clock.by == "device events" and clock.seconds(gpu.work(0.01), 7) == pytest.approx(1e-5)
    medians = clock.medians({"a": gpu.work(0.01), "b": gpu.work(2.5), "long": gpu.work(40.0)}, 0.01)
    assert medians == pytest.approx({"a": 1e-5, "b": 2.5e-3, "long": 4e-2})


def test_device_is_blocked_until_all_calls_are_queued(monkeypatch):
    gpu = Gpu(monkeypatch)
    clock = Clock("xpu")
    clock.seconds(gpu.work(0.01))
    for count, enough in ((10, 10 * 2e-3), (100, timing._MOST_BLOCKED_SECONDS)):
        before = gpu.blockers
        assert clock.seconds(gpu.work(0.01, launch=2e-3), count) == pytest.approx(1e-5)
        assert gpu.blockers - before >= enough / 1e-3
    assert gpu.blockers - before <= timing._MOST_BLOCKERS
