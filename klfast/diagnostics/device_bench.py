"""A minute of timing on a device: groups of the bench suite, klfast beside torch. Wrong results are not timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from klfast.bench import test_divergence, test_linear, test_scan
from klfast.benchkit.clock import Clock
from klfast.benchkit.runner import Contender, Group, UnavailableError, is_ours
from klfast.benchkit.settings import Settings
from klfast.core.errors import one_line

# (K, N): in_proj and out_proj of Mamba-1.4B, the MLP's first layers of Hymba-1.5B, in_proj of Mamba-130M.
SHAPES = ((2048, 8192), (4096, 2048), (1600, 8960), (768, 3072))
ROWS = (1, 8, 128)
WORKING_SET = 128_000_000  # bytes of weights to rotate through, more than caches hold
SUITES = {"linear": test_linear, "scan": test_scan, "divergence": test_divergence}  # the longest last
CONTENDERS = (
    "klfast",
    "klfast int4 exact",
    "klfast int4 int8",
    "torch fp16",
    "torch int4pack",
    "torch KL",
    "torch bf16 products alone",
    "transformers",
)
PATIENCE = 3  # time limit in multiples of the given seconds, with compilation and checks; later groups are skipped


@dataclass(frozen=True)
class Row:
    """A contender's median in seconds and its speedup over the group's first peer, or a note why it has none."""

    group: str
    contender: str
    seconds: float = math.nan
    speedup: float = math.nan
    error: float = math.nan
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return f"    {self.contender:<26} {self.note}"
        speedup = "" if math.isnan(self.speedup) else f"{self.speedup:.2f}x"
        return f"    {self.contender:<26} {self.seconds * 1e3:>10.4f} ms {speedup:>9}   (error {self.error:.1e})"


def groups(device: str) -> list[Group]:
    """Return the groups to time: some of the suite's contenders, and only bfloat16 of functions in two dtypes."""
    settings = Settings(
        device=device, threads=torch.get_num_threads(), working_set=WORKING_SET, shapes=SHAPES, rows=ROWS
    )
    return [
        replace(
            group,
            name=f"{suite} {group.name}",
            contenders={name: build for name, build in group.contenders.items() if name in CONTENDERS},
        )
        for suite, module in SUITES.items()
        for group in module.groups(settings)
        if not group.name.endswith("fp32")
    ]


def run(
    some: Sequence[Group], clock: Clock, seconds: float, tell: Callable[[str], None] = lambda _: None
) -> Iterator[list[Row]]:
    """Yield the rows of each group, timed for its share of ``seconds``.

    ``tell`` gets the name of each contender before it runs.
    """
    end = time.monotonic() + PATIENCE * seconds
    for group in some:
        if time.monotonic() > end:
            yield [Row(group.name, name, note="skipped, the time is over") for name in group.contenders]
        else:
            yield _time(group, clock, seconds / len(some), tell)


def _time(group: Group, clock: Clock, seconds: float, tell: Callable[[str], None]) -> list[Row]:
    ready: dict[str, Contender] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, build in group.contenders.items():
        tell(f"{group.name}, {name}")
        try:
            contender = build()
            errors[name] = 0.0 if contender.error is None else contender.error()
        except UnavailableError as reason:
            notes[name] = str(reason)
        except Exception as failure:  # noqa: BLE001 (a compiler's or a driver's, for example; the others go on)
            notes[name] = f"fails: {one_line(failure)}"
        else:
            if errors[name] <= contender.tolerance:
                ready[name] = contender
            else:
                notes[name] = f"wrong: error {errors[name]:.1e} exceeds the tolerance {contender.tolerance:.0e}"
    medians: dict[str, float] = {}
    try:
        medians = clock.medians(ready, seconds)
    except Exception as failure:  # noqa: BLE001 (likewise)
        notes |= dict.fromkeys(ready, f"fails when timed: {one_line(failure)}")
    peer = next((medians[name] for name in medians if not is_ours(name)), math.nan)
    return [
        Row(group.name, name, time, peer / time, errors.get(name, math.nan), notes.get(name, ""))
        for name, time in ((name, medians.get(name, math.nan)) for name in group.contenders)
    ]
