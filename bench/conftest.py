"""Hooks of the suite: options, one test per contender of each group, and the files written at the end."""

from __future__ import annotations

import pytest
import torch

import klfast
from klfast.benchkit.runner import Benchmark, Contender, Group, Race, Times, UnavailableError
from klfast.benchkit.settings import Settings, add_options
from klfast.core.io import write_atomic

from . import llama_cpp, machine, models, results, roofline


def pytest_addoption(parser):
    add_options(parser)


def pytest_configure(config):
    settings = Settings.of(config)
    try:
        models.require(settings)
        llama_cpp.require(settings)
    except klfast.InvalidInputError as error:
        raise pytest.UsageError(str(error)) from None
    if settings.device != "cpu" or settings.llama_cpp is not None:
        # but the device's clock, or the peer's own
        config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    torch.set_num_threads(settings.threads)
    if settings.isa is not None:
        pin = klfast.using(settings.isa)
        pin.__enter__()
        config.add_cleanup(lambda: pin.__exit__(None, None, None))
    config.klfast_settings = settings
    config.klfast_run = Run(settings)


def pytest_generate_tests(metafunc):
    if "group" in metafunc.fixturenames:
        pairs = [
            (group, name)
            for group in metafunc.module.groups(metafunc.config.klfast_settings)
            for name in group.contenders
        ]
        metafunc.parametrize(("group", "name"), pairs, ids=[f"{group.name}, {name}" for group, name in pairs])


class Run:
    """State of a run: the race, the results, and the bandwidth measured beside each group."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.race, self.results = settings, Race(settings), results.Results()
        # Read now, since the results may be written to the same folder.
        self.earlier = None if settings.compare is None else results.read(settings.compare)
        self.facts: dict[str, object] = {}
        self._read_gbps = 0.0
        self._bandwidth: machine.Bandwidth | None = None

    def start(self) -> None:
        """Measure the machine."""
        self._bandwidth, self.facts = machine.Bandwidth(self.settings), machine.facts(self.settings)

    def time(self, suite: str, group: Group, name: str, benchmark: Benchmark) -> None:
        """Check and time a contender, and add its row."""
        if self.race.enter(group):
            self.results.write(self.settings.out, self.facts)  # a crash of a peer would lose them
            self._read_gbps = self._bandwidth.measure() / 1e9
        try:
            contender = self.race.contender(name)
        except UnavailableError as reason:
            pytest.skip(str(reason))
        benchmark.group = f"{suite} {group.name}"
        times, ratios = self.race.run(name, benchmark)
        columns = self._columns(group, contender, times)
        benchmark.extra_info.update(columns)
        self.results.add(suite, group.name, name, **columns)
        for ours, ratio in ratios.items():
            self.results.ratio(suite, group.name, ours, name, ratio)

    def _columns(self, group: Group, contender: Contender, times: Times) -> dict[str, object]:
        columns = {**group.facts, "median_s": times.median, "min_s": times.min, "rounds": len(times.rounds)}
        if contender.error is not None:
            columns["error"] = f"{contender.measured_error:.1e}"
        columns["read_gbps"] = round(self._read_gbps, 2)
        if contender.nbytes:
            floor = contender.nbytes / self._read_gbps / 1e9
            columns |= {
                "read_mb": contender.nbytes / 1e6,
                "rotated_mb": round(contender.rotated_nbytes / 1e6),
                "floor_s": floor,
                "share_of_floor": round(floor / times.median, 4),
            }
        if group.flops:
            columns["tflops"] = round(group.flops / times.median / 1e12, 5)
            if contender.peak:
                columns["share_of_peak"] = round(columns["tflops"] / self.facts[f"peak_{contender.peak}_tflops"], 4)
        if contender.facts is not None:
            columns |= contender.facts(times.median)
        return columns


@pytest.fixture(scope="session")
def run(request):
    """Return the run; the machine is measured before the first contender."""
    found = request.config.klfast_run
    found.start()
    return found


@pytest.fixture(autouse=True)
def _without_gradients():
    """Start each test with the same random numbers, in inference mode."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def pytest_terminal_summary(terminalreporter, config):
    run = config.klfast_run
    if not run.results.rows:
        return
    settings, rows = run.settings, [row | run.facts for row in run.results.rows]
    written = run.results.write(settings.out, run.facts)
    if any(row["suite"] == "linear" for row in rows):
        try:
            roofline.draw([row for row in rows if row["suite"] == "linear"], settings.out / "roofline.png")
            written.append(settings.out / "roofline.png")
        except ImportError as missing:
            terminalreporter.write_line(f"No roofline: {missing}; pip install 'klfast[bench]'")
    terminalreporter.section("klfast bench")
    terminalreporter.write_line(results.conditions(rows))
    for line in results.summary(rows):
        terminalreporter.write_line(line)
    if run.earlier is not None:
        text = results.compare(run.earlier, rows)
        write_atomic(settings.out / "compare.md", text)
        terminalreporter.write_line(text)
    terminalreporter.write_line(f"Written to {settings.out}: {', '.join(path.name for path in written)}")
