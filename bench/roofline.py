"""Roofline plot of the linear suite: TFLOP/s over operations per byte, under the machine's limits."""

from __future__ import annotations

from pathlib import Path

from klfast.benchkit.runner import is_ours

from .results import number


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Draw the contenders that read and compute, from the CSV's rows, into ``path``. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = [row for row in rows if number(row.get("tflops")) > 0 and number(row.get("read_mb")) > 0]
    figure, axes = plt.subplots(figsize=(9, 6))
    intensities = []
    for name in dict.fromkeys(row["contender"] for row in points):
        chosen = [row for row in points if row["contender"] == name]
        x = [number(r["tflops"]) * 1e6 * number(r["median_s"]) / number(r["read_mb"]) for r in chosen]
        axes.scatter(
            x,
            [number(r["tflops"]) for r in chosen],
            s=28 if is_ours(name) else 14,
            marker="o" if is_ours(name) else "x",
            label=name,
        )
        intensities += x
    bandwidth = max(number(row["read_gbps"]) for row in points) / 1e3  # TB/s
    ends = min(intensities) / 2, max(intensities) * 2
    peaks = {
        name[5:-7]: number(value) for name, value in points[0].items() if name.startswith("peak_") and number(value) > 0
    }
    for dtype, peak in peaks.items():
        knee = min(max(peak / bandwidth, ends[0]), ends[1])
        axes.plot((knee, ends[1]), (peak, peak), color="gray", linewidth=1)
        axes.annotate(f"torch's fastest product, {dtype}", (ends[1], peak), fontsize=8, ha="right", va="bottom")
    top = max(peaks.values()) / bandwidth
    axes.plot(
        (ends[0], top),
        (ends[0] * bandwidth, top * bandwidth),
        color="gray",
        linewidth=1,
        label=f"read bandwidth, {bandwidth * 1e3:.1f} GB/s",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte of weights",
        ylabel="TFLOP/s",
        title=f"Linear layers, {points[0]['machine']}, {points[0]['threads']} threads",
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
