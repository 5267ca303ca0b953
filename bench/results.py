"""Rows of a run: collected, written as CSV and Markdown, read back, compared."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from klfast.benchkit.runner import is_ours
from klfast.core.io import write_atomic

RATIO = "times as fast as "  # prefix of the columns of ratios, followed by the peer's name
_KEY = ("suite", "group", "contender")
_FIGURES = (
    "median_s",
    "min_s",
    "rounds",
    "error",
    "read_mb",
    "rotated_mb",
    "read_gbps",
    "floor_s",
    "share_of_floor",
    "tflops",
    "share_of_peak",
)
_EXTRA = (
    "tok_s",
    "gemm_s",
    "scan_s",
    "rest_s",
    "extra_mb",
    "weights_mb",
    "memory_gb",
    "first_p50_ms",
    "first_p99_ms",
    "between_p50_ms",
    "between_p99_ms",
)


class Results:
    """The rows of a run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, suite: str, group: str, contender: str, **columns: object) -> None:
        """Add a row after the others of its group."""
        after = [i for i, row in enumerate(self.rows, 1) if (row["suite"], row["group"]) == (suite, group)]
        row = {"suite": suite, "group": group, "contender": contender, **columns}
        self.rows.insert(after[-1] if after else len(self.rows), row)

    def ratio(self, suite: str, group: str, ours: str, peer: str, ratio: float) -> None:
        """Record the speedup over ``peer`` in the row of ``ours``, if it has one (pytest's -k may exclude it)."""
        for row in self.rows:
            if tuple(row[name] for name in _KEY) == (suite, group, ours):
                row[RATIO + peer] = round(ratio, 3)

    def suites(self) -> dict[str, list[dict[str, object]]]:
        """Return the rows of each suite that ran."""
        return {
            suite: [r for r in self.rows if r["suite"] == suite]
            for suite in dict.fromkeys(r["suite"] for r in self.rows)
        }

    def write(self, folder: Path, facts: dict[str, object]) -> list[Path]:
        """Write <suite>.csv and <suite>.md for each suite that ran, with ``facts`` about the machine."""
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for suite, measured in self.suites().items():
            rows = [row | facts for row in measured]
            for path, text in ((folder / f"{suite}.csv", _csv(rows)), (folder / f"{suite}.md", markdown(suite, rows))):
                write_atomic(path, text)
                written.append(path)
        return written


def _csv(rows: list[dict[str, object]]) -> str:
    """Return CSV with the columns in order: what was timed, figures, ratios, then machine and versions."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    ratios = [name for name in columns if name.startswith(RATIO)]
    first = [*_KEY, *(name for name in _FIGURES if name in columns), *ratios]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*first, *(name for name in columns if name not in first)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read(folder: Path) -> list[dict[str, str]]:
    """Return the rows of all suites in a folder that ``Results.write`` wrote."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        rows += [row for row in found if set(_KEY) <= set(row)]
    return rows


def number(value: object) -> float:
    """Return a cell as a number, NaN if it is not one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def seconds(value: float) -> str:
    """Format a time with its unit and three digits."""
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def conditions(rows: Sequence[dict[str, object]]) -> str:
    """Return sentences on a run: machine, threads, versions, what its calls rotate through, and the machine's peaks."""
    row = rows[0]
    versions = ", ".join(
        f"{name} {row[name]}"
        for name in ("klfast", "torch", "triton", "driver", "transformers", "openvino", "python")
        if row.get(name)
    )
    limit = f" (oneDNN limited to {row['onednn_max_cpu_isa']})" if row.get("onednn_max_cpu_isa") else ""
    tops = ", ".join(
        f"{name[5:-7]} {number(row[name]):.3g}" for name in row if name.startswith("peak_") and number(row[name]) > 0
    )
    return (
        f"{row['machine']}, {row['device']}, tier {row['tier']}, {row['threads']} threads{limit}; {versions}; "
        f"{row['time']}. {_rotation(rows)}Fastest large products of torch, in TFLOP/s: {tops}."
    )


def _rotation(rows: Sequence[dict[str, object]]) -> str:
    """Return a sentence on the copies that calls rotate through; empty if there is one of each, as of whole models."""
    turning = [row for row in rows if number(row.get("rotated_mb")) > 1 + number(row.get("read_mb"))]
    what = " and ".join(dict.fromkeys("states" if row["suite"] == "scan" else "weights" for row in turning))
    return f"{what.capitalize()} rotate through up to {turning[0]['working_set_mb']} MB. " if turning else ""


def markdown(suite: str, rows: list[dict[str, object]], level: int = 1) -> str:
    """Return a suite's table under a heading: a line per contender, grouped, with the columns that have figures."""
    peers = list(dict.fromkeys(name for row in rows for name in row if name and name.startswith(RATIO)))
    floors = any(number(row.get("share_of_floor")) > 0 for row in rows)
    extra = [name for name in _EXTRA if any(number(row.get(name)) >= 0 for row in rows)]
    headings = [
        "group",
        "contender",
        "median",
        *(["GB/s read", "of the floor", "TFLOP/s", "of the peak"] if floors else []),
        *extra,
        *(f"vs {name.removeprefix(RATIO)}" for name in peers),
    ]
    lines = [f"{'#' * level} {suite}", "", conditions(rows), ""]
    lines += ["| " + " | ".join(headings) + " |", "|---|---" + "|---:" * (len(headings) - 2) + "|"]
    last = None
    for row in rows:
        cells = [row["group"] if row["group"] != last else "", row["contender"], seconds(number(row["median_s"]))]
        last = row["group"]
        if floors:
            cells += [
                _cell(row.get("read_gbps"), ".1f"),
                _cell(row.get("share_of_floor"), ".2f"),
                _cell(row.get("tflops"), ".3f"),
                _cell(row.get("share_of_peak"), ".2f"),
            ]
        cells += [_cell(row.get(name), ".4g") if number(row.get(name)) >= 0 else "" for name in extra]
        cells += [_cell(row.get(name), ".2f") for name in peers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _cell(value: object, form: str) -> str:
    found = number(value)
    return "" if math.isnan(found) else format(found, form)


def summary(rows: list[dict[str, object]]) -> list[str]:
    """Return a line for each of klfast's contenders: its time, share of the floor, and fastest peer."""
    lines = []
    for row in rows:
        if not is_ours(row["contender"]):
            continue
        ratios = {
            name.removeprefix(RATIO): number(value) for name, value in row.items() if name.startswith(RATIO) and value
        }
        best = min(ratios, key=ratios.get, default=None)
        share = f", {number(row['share_of_floor']):.2f} of the floor" if row.get("share_of_floor") else ""
        against = f", {ratios[best]:.2f} times as fast as {best}" if best else ""
        lines.append(
            f"{row['suite']} {row['group']}: {row['contender']} {seconds(number(row['median_s']))}{share}{against}"
        )
    return lines


def compare(earlier: list[dict[str, str]], now: list[dict[str, object]]) -> str:
    """Return a Markdown table of the contenders in both runs; a ratio above 1 means that the later run is faster."""
    before = {tuple(row[name] for name in _KEY): row for row in earlier}
    lines = [
        "| suite | group | contender | earlier | now | earlier / now | share of the floor, earlier | now |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in now:
        old = before.get(tuple(row[name] for name in _KEY))
        if old is not None:
            then, since = number(old["median_s"]), number(row["median_s"])
            shares = (_cell(r.get("share_of_floor"), ".2f") for r in (old, row))
            key = (str(row[name]) for name in _KEY)
            cells = (*key, seconds(then), seconds(since), f"{then / since:.2f}", *shares)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""]) if len(lines) > 2 else "No contender took part in both runs.\n"
