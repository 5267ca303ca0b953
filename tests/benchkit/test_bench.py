"""The bench suite: a small run from the command line, its files, and no timing of wrong results."""

import csv
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from command_line import fails
from typer.testing import CliRunner

import klfast
from bench import (
    conftest,
    document,
    machine,
    models,
    results,
    sweep_cost,
    test_decode,
    test_families,
    test_hymba,
    test_linear,
    test_scan,
    test_sweep,
)
from klfast.benchkit import peers, runner
from klfast.benchkit.runner import Contender, Group, Race, UnavailableError
from klfast.benchkit.settings import Settings
from klfast.cli import app
from klfast.cli import bench as bench_command


def klf(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Return the folder of results of a small run, and its output."""
    out = tmp_path_factory.mktemp("bench")
    settings = ("--shapes", "64x96", "--rows", "3", "--threads", 1, "--device", "cpu", "--isa", "scalar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")
        run = klf("bench", "linear", "--quick", *settings, "--out", out, "--json")
    assert run.exit_code == 0, run.output
    return out, json.loads(run.stdout)


@pytest.mark.slow
def test_run_writes_csv_markdown_and_plot(ran):
    out, printed = ran
    assert {"linear.csv", "linear.md", "roofline.png"} <= {path.name for path in out.iterdir()}
    with (out / "linear.csv").open() as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert list(rows.values()) == printed["rows"]
    assert {
        "klfast int4 exact",
        "klfast int8 int8",
        "klfast linear bf16",
        "torch fp32",
        "torch bf16",
        "torch int4pack",
    } <= set(rows)
    for row in rows.values():
        assert float(row["min_s"]) <= float(row["median_s"]) and int(row["rounds"]) >= 3
        assert all(float(row[name]) > 0 for name in ("share_of_floor", "read_gbps", "peak_float32_tflops"))
        assert row["machine"] and row["tier"] == "scalar" and row["threads"] == "1" and row["torch"] and row["time"]
    assert all(
        float(rows["klfast int4 exact"][results.RATIO + peer]) > 0
        for peer in ("torch fp32", "torch bf16", "torch fp16", "torch int4pack", "torch int8pack")
    )
    table = (out / "linear.md").read_text()
    assert "| 64x96, M=3 | klfast int4 exact |" in table and "tier scalar, 1 threads" in table


def test_comparison_of_a_run_with_itself(ran):
    rows = results.read(ran[0])
    lines = results.compare(rows, rows).splitlines()[2:]
    assert len(lines) == len(rows) and all("| 1.00 |" in line for line in lines)
    assert len(results.compare(rows[:1], rows).splitlines()) == 3
    assert results.compare([], rows).startswith("No contender")


def test_page_shows_the_rows_of_a_run(ran):
    page = document.render(ran[0])
    assert "klfast int8 exact" in page and "roofline.png" in page and "## decode\n\nNo results" in page


def test_committed_page_matches_the_committed_results():
    assert document.DOCUMENT.read_text() == document.render(document.RESULTS), "run python -m bench.document"


def test_no_table_shows_negative_seconds_or_weights_that_do_not_rotate():
    facts = {"machine": "a CPU", "device": "cpu", "tier": "avx2", "threads": 2, "time": "now", "working_set_mb": 1000}
    row = {"suite": "decode", "group": "g", "contender": "klfast", "median_s": 1.0, "rest_s": -0.1231, **facts}
    rows = [row | {"read_mb": 8209.2, "rotated_mb": 257}, row | {"rest_s": 0.5, "read_mb": 0.6, "rotated_mb": 1}]
    table = results.markdown("decode", rows)
    assert "-0.1" not in table and "| 0.5 |" in table and "rotate" not in table
    turning = row | {"suite": "linear", "read_mb": 8.4, "rotated_mb": 1000}
    assert "now. Weights rotate through up to 1000 MB. Fastest" in results.conditions([row, turning])
    assert "States rotate" in results.conditions([turning | {"suite": "scan"}])
    assert document.DOCUMENT.read_text().count("Weights rotate") == 1, "only linear's"


@torch.no_grad()
def test_copies_of_a_whole_model_count_once():
    """Of 4 tokens, each call reads all of the weights 4 times."""
    for group in test_decode.groups(Settings(quick=True, models=("mamba-tiny",))):
        if group.facts["stage"] == "decode":
            made = [build() for name, build in group.contenders.items() if "llama" not in name]
            assert [one.nbytes for one in made] == [4 * one.rotated_nbytes for one in made] and made[0].nbytes
    run = SimpleNamespace(_read_gbps=10.0, facts={})
    columns = conftest.Run._columns(run, group, made[0], runner.Times([1.0]))
    assert columns["rotated_mb"] == round(made[0].nbytes / 4e6)
    [step] = [one for one in test_scan.groups(Settings(quick=True, working_set=9_000_000)) if "L=1 fp32" in one.name]
    assert step.contenders["klfast"]().rotated_nbytes == 3 * 32 * 128 * 128 * 4


@torch.no_grad()
def test_a_profile_slower_than_the_run_leaves_no_rest():
    model, prompt = models.ours("mamba-tiny", (), "exact"), torch.randint(0, 512, (1, 16))
    assert models.shares(model, prompt, 0.0).keys() == {"gemm_s", "scan_s"}
    found = models.shares(model, prompt, 100.0)
    assert sum(found.values()) == pytest.approx(100, abs=1e-4) and found["rest_s"] > 90


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_megabytes_are_a_million_bytes():
    peak = machine.memory_peak(lambda: torch.ones(100_000_000), "cpu")
    assert math.isnan(peak) or peak == pytest.approx(400, rel=0.01)
    known = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert sweep_cost._mb("VmPeak") > sweep_cost._mb("VmRSS")
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    assert sweep_cost._mb("VmRSS") == pytest.approx(pages * resource.getpagesize() / 1e6, rel=0.01)
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    facts = test_hymba._contender(layer, lambda: None, None, 0.0, 1).facts(1.0)
    assert facts["memory_gb"] == pytest.approx(known / 1e9, abs=0.011)


@pytest.mark.parametrize(
    "wrong",
    [
        *(["foo"], ["--shapes", "64"], ["--rows", "1;2"], ["--isa", "sse"], ["--device", "tpu"]),
        *(["--working-set", "much"], ["--working-set", "0"]),
        *(["linear", "--devices", "NPU"], ["linear", "--prompt-tokens", "5"], ["linear", "--new-tokens", "5"]),
        *(["openvino", "folder", "--quick"], ["openvino", "folder", "--rows", "3"]),
        *(["openvino", "folder", "--seconds", "1"], ["openvino", "folder", "--isa", "scalar"]),
    ],
    ids=" ".join,
)
def test_wrong_usage(wrong):
    assert klf("bench", *wrong).exit_code == 2


def test_models_by_the_beginnings_of_their_names():
    settings = Settings(models=("qwen3.5", "jamba"))
    names = [group.facts["model"] for group in test_families.groups(settings)]
    assert names == [name for name in ("qwen3.5-0.8b", "qwen3.5-2b", "jamba2-3b, 7 layers") for _ in range(2)]
    assert not [*test_decode.groups(settings)]
    assert len([*test_decode.groups(Settings(models=("mamba-1.4b",)))]) == 3
    with pytest.raises(klfast.InvalidInputError, match=r"^no model's name begins with 'gpt'; there are mamba-130m, "):
        models.require(Settings(models=("mamba", "gpt")))


class Benchmark:
    """The part of pytest-benchmark's fixture that a race uses."""

    stats = SimpleNamespace(stats=SimpleNamespace(data=[1.0, 2.0, 4.0]))

    def pedantic(self, call, setup, rounds):
        for _ in range(rounds):
            setup()
            call()


def race(device="cpu", /, **errors):
    """Return a race between contenders with the given errors, and the growing list of their calls."""
    calls = []

    def built(name, error):
        if isinstance(error, Exception):
            raise error
        return Contender([lambda i=i: calls.append((name, i)) for i in range(2)], lambda: error, 1e-3)

    found = Race(SimpleNamespace(device=device, seconds=0.0))
    found.enter(Group("group", {}, {name: partial(built, name, error) for name, error in errors.items()}))
    return found, calls


def test_wrong_results_are_not_timed():
    found, calls = race(klfast=0.5, klfast_nan=float("nan"), torch=0.0)
    for name in ("klfast", "klfast_nan"):
        with pytest.raises(AssertionError, match=f"{name}: error .* exceeds the tolerance 1e-03; .*not timed"):
            found.run(name, Benchmark())
    assert not calls
    times, ratios = found.run("torch", Benchmark())
    assert ratios == {} and (times.median, times.min) == (2.0, 1.0)


def test_klfast_takes_turns_with_a_peer_and_weights_rotate():
    found, calls = race(klfast=0.0, klfast_other=UnavailableError("not here"), torch=0.0)
    assert found.run("klfast", Benchmark())[1] == {}
    calls.clear()
    _, ratios = found.run("torch", Benchmark())
    assert list(ratios) == ["klfast"] and ratios["klfast"] > 1
    turns = [(name, len(list(some))) for name, some in itertools.groupby(calls, key=lambda call: call[0])]
    assert turns == [("klfast", 2), ("torch", 2)] * (len(turns) // 2) and len(turns) > 6  # an untimed call, a timed one
    for name in ("klfast", "torch"):
        copies = [copy for who, copy in calls if who == name]
        assert all(a != b for a, b in itertools.pairwise(copies))


def test_weights_in_the_formats_of_int4_ops_for_gpus():
    weight = klfast.quantize(torch.randn(16, 64), klfast.QuantSpec(4, 32))
    expected = weight.dequantize(torch.float32)
    words, scale, zero_point = peers.int4pack_xpu(weight, torch.float32)
    codes = torch.stack([words >> 4 * i & 15 for i in range(8)], -1).flatten(1)  # the lowest bits first
    assert torch.equal((codes - zero_point.T.repeat_interleave(32, 1)) * scale.T.repeat_interleave(32, 1), expected)
    codes, scales_and_zeros = peers.shifted_codes(weight), peers.scales_and_zeros_of(weight, torch.float32)
    scale, zero = scales_and_zeros.transpose(0, 1).repeat_interleave(32, 1).unbind(-1)
    assert torch.equal((codes.float() - 8) * scale + zero, expected)


def test_gpu_is_timed_by_its_own_clock(monkeypatch):
    class Clock:
        def __init__(self, device):
            assert device == "xpu"

        def samples(self, calls, seconds, most_rounds):
            return {name: [1.0, 3.0, 8.0] if name == "torch" else [2.0] for name in calls}

    monkeypatch.setattr(runner, "Clock", Clock)
    found, _ = race("xpu", klfast=0.0, torch=0.0)
    times, ratios = found.run("torch", None)
    assert (times.median, times.min, len(times.rounds)) == (3.0, 1.0, 3) and ratios == {"klfast": 1.5}


def test_sizes_only_for_gpus():
    names = {
        device: [group.name for suite in (test_linear, test_sweep) for group in suite.groups(Settings(device=device))]
        for device in ("cpu", "xpu")
    }
    assert set(names["xpu"]) - set(names["cpu"]) >= {
        "8192x8192, M=1",
        "8192x8192, M=64",
        "2048x8192, M=4096",
        "mamba-1.4b, 8x256 tokens",
    }
    assert not any("8192x8192" in name or name.endswith(("M=64", "M=4096")) or "1.4b" in name for name in names["cpu"])


def test_sweep_of_random_weights():
    """As on a GPU, it is checked in float32 on some layers and timed in bfloat16 on all."""
    setting = test_sweep.random("mamba-tiny", 2, 16, None, "cpu")
    with torch.no_grad():
        assert setting.error() < 1e-2
        setting.model.to(setting.timed)
        assert test_sweep.swept(setting.model, setting.text, setting.names).shape == (2 * len(setting.names),)


def test_memory_of_a_gpu(monkeypatch):
    used = iter([5_000_000, 30_000_000])
    module = SimpleNamespace(
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: next(used),
        max_memory_allocated=lambda: next(used),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert machine.memory_peak(lambda: None, "xpu") == 25.0


def test_a_bench_that_is_told_to_end_takes_its_process_along(tmp_path):
    ready = tmp_path / "ready"
    sleeping = f"""import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
pathlib.Path({str(ready)!r}).touch()
time.sleep(60)"""

    def end():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=end).start()
    begin = time.monotonic()
    assert bench_command._ended([sys.executable, "-c", sleeping], stderr=subprocess.DEVNULL) == 143
    assert time.monotonic() - begin < 50
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("suite", "option", "message"),
    [
        ("linear", ("--models", "mamba"), "--models goes with the suite decode or families or serve"),
        ("decode", ("--shapes", "64x96"), "--shapes goes with the suite linear"),
        ("scan", ("--rows", "1"), "--rows goes with the suite linear"),
        ("sweep", ("--llama-cpp", "."), "--llama-cpp goes with the suite decode or families"),
    ],
)
def test_options_of_other_suites(suite, option, message):
    assert message in fails("bench", suite, *option, code=2)
