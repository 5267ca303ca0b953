"""Draw the pictures of CONCEPTS.md, from the sweep, plan and KL card in bench/results/hymba_report.

    .venv/bin/python docs/charts.py

They are SVG files in docs/images, each on a light ground of its own, for light and dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import klfast
from klfast.planning.front import front_plans, uniform_plans
from klfast.reporting.grouping import by_spec, depth, kind
from klfast.reporting.page.axis import Axis, number
from klfast.reporting.page.markup import Markup, joined, tag

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "bench" / "results" / "hymba_report", ROOT / "docs" / "images"
KL = "kl_teacher_student"
INK, SOFT, RULE, PAPER = "#1b1f24", "#525b66", "#d5d9df", "#f7f8fa"
WARM, COOL = "#a83a10", "#1f5f9e"
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 96, 24, 44, 48


def text(words: str, x: float, y: float, *, anchor: str = "start", fill: str = SOFT, weight: int = 400) -> Markup:
    """Return a line of text."""
    return tag("text", words, x=round(x, 1), y=round(y, 1), text_anchor=anchor, fill=fill, font_weight=weight)


def line(x1: float, y1: float, x2: float, y2: float, color: str = RULE, width: float = 1, **more: object) -> Markup:
    """Return a straight line."""
    ends = {name: round(value, 1) for name, value in (("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2))}
    return tag("line", **ends, stroke=color, stroke_width=width, **more)


def dot(x: float, y: float, color: str, title: str, radius: float = 4) -> Markup:
    """Return a point that says what it is when pointed at."""
    circle = tag("circle", cx=round(x, 1), cy=round(y, 1), r=radius, fill=color, fill_opacity=0.75)
    return tag("g", circle, tag("title", title))


def box(words: str, x: float, y: float, width: float, height: float, fill: str, ink: str = INK) -> Markup:
    """Return a labelled rectangle."""
    shape = tag("rect", x=x, y=y, width=width, height=height, rx=6, fill=fill, stroke=SOFT)
    return joined([shape, text(words, x + width / 2, y + height / 2 + 5, anchor="middle", fill=ink)])


def picture(title: str, height: int, parts: Iterable[Markup]) -> str:
    """Return an SVG file."""
    ground = tag("rect", width=WIDTH, height=height, rx=8, fill=PAPER)
    return tag(
        "svg",
        tag("title", title),
        ground,
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        font_family="system-ui, sans-serif",
        font_size=14,
    )


def scale(axis: Axis, start: float, end: float) -> Callable[[float], float]:
    """Return the function from a value to its place between two ends."""
    return lambda value: start + axis.share(value) * (end - start)


def one_layer() -> str:
    """Draw what is measured: one rounded layer, two distributions, their KL."""
    names = ("block 0", "block 1", "block 2", "...", "head")
    parts = []
    for row, (label, rounded) in enumerate((("full precision", None), ("one layer in INT4", 1))):
        y = 56 + 104 * row
        parts.append(text(label, 20, y - 14, fill=INK, weight=600))
        for index, name in enumerate(names):
            x = 20 + 84 * index
            is_rounded = index == rounded
            parts.append(box(name, x, y, 70, 40, WARM if is_rounded else "#ffffff", "#ffffff" if is_rounded else INK))
            parts.append(line(x + 70, y + 20, x + 84, y + 20, SOFT, 1.5))
        heights = ((34, 22, 12, 7, 4), (29, 25, 11, 9, 4))[row]
        for index, height in enumerate(heights):
            bar = COOL if row == 0 else WARM
            parts.append(tag("rect", x=450 + 18 * index, y=y + 40 - height, width=13, height=height, fill=bar))
        parts.append(line(444, y + 40, 542, y + 40, SOFT))
    parts += [
        text("next token", 493, 116, anchor="middle"),
        text("next token", 493, 220, anchor="middle"),
        tag("path", d="M554 78 H570 V180 H554", fill="none", stroke=SOFT, stroke_width=1.5),
        text("KL(full || INT4)", 580, 126, fill=INK, weight=600),
        text("a token", 580, 146),
    ]
    return picture("One layer is rounded; KL compares the next-token distributions", 236, parts)


def per_layer(swept: klfast.Sensitivities) -> str:
    """Draw the KL of each layer alone in the coarsest spec, worst first."""
    spec, found = next(iter(by_spec(swept).items()))
    worst = sorted(((m.mean[KL], name) for name, m in found.items()), reverse=True)
    height = 340
    up = Axis.spanning([1e-6, 1e-1])
    y, step = scale(up, height - BOTTOM, TOP), (WIDTH - LEFT - RIGHT) / len(worst)
    parts = grid_across(up, y, "KL, nats a token")
    for rank, (value, name) in enumerate(worst):
        block = depth(name)
        label = kind(name) if block is None else f"block {block}, {kind(name)}"
        color = WARM if kind(name) in ("in_proj", "out_proj", "lm_head") else COOL
        parts.append(dot(LEFT + (rank + 0.5) * step, y(value), color, f"{label}: {value:.2g}"))
        if rank in (0, 1, len(worst) - 1):
            x = LEFT + (rank + 0.5) * step
            said = f"{label} {value:.2g}"
            is_last = rank == len(worst) - 1
            parts.append(
                text(said, x - 8, y(value) + 20, anchor="end", fill=INK)
                if is_last
                else text(said, x + 8, y(value) - 8, fill=INK)
            )
    share = worst[0][0] / sum(value for value, _ in worst)
    note = f"{len(worst)} layers, each alone in {spec}. The first has {share:.0%} of the sum."
    parts.append(text(f"{note} Red: in_proj, out_proj, head.", 12, height - 16))
    return picture("KL of each layer alone", height, parts)


def noise(swept: klfast.Sensitivities) -> str:
    """Draw the KL of all layers in each spec beside the noise floor of the sweep."""
    specs = by_spec(swept)
    height = 92 + 48 * len(specs)
    across = Axis.spanning([1e-13, 1e-1])
    x, floor = scale(across, LEFT + 24, WIDTH - RIGHT - 12), swept.noise_floor[KL]
    parts = [line(x(tick), 40, x(tick), height - BOTTOM) for tick in across.ticks(12)]
    parts += [text(f"{tick:.0e}", x(tick), height - BOTTOM + 20, anchor="middle") for tick in across.ticks(6)]
    parts.append(line(x(floor), 34, x(floor), height - BOTTOM, WARM, 2, stroke_dasharray="5 4"))
    parts.append(text(f"noise floor {floor:.1g}", x(floor) + 6, 28, fill=WARM, weight=600))
    for row, (spec, found) in enumerate(specs.items()):
        y = 64 + 48 * row
        parts.append(text(str(spec), 12, y + 5, fill=INK))
        parts += [dot(x(m.mean[KL]), y, COOL, f"{name}: {m.mean[KL]:.2g}") for name, m in found.items()]
    parts.append(text("KL, nats a token; a point is a layer", WIDTH - RIGHT, height - 8, anchor="end"))
    return picture("Layers' KL in three precisions, and the noise floor", height, parts)


def front(swept: klfast.Sensitivities, plan: klfast.Plan, measured: float) -> str:
    """Draw size against KL: best plans, uniform ones, and one plan with its measured KL."""
    best = [(one.predicted["bytes"] / 1e6, one.predicted["kl"]) for one in front_plans(swept)]
    uniform = [(name, one.predicted["bytes"] / 1e6, one.predicted["kl"]) for name, one in uniform_plans(swept).items()]
    height = 360
    across = Axis.of([size for size, _ in best] + [size for _, size, _ in uniform], linear=True)
    up = Axis.of([kl for _, kl in best] + [kl for *_, kl in uniform])
    x, y = scale(across, LEFT, WIDTH - RIGHT), scale(up, height - BOTTOM, TOP)
    parts = grid_across(up, y, "KL, nats a token")
    parts += [line(x(tick), TOP, x(tick), height - BOTTOM) for tick in across.ticks()]
    parts += [text(number(tick), x(tick), height - BOTTOM + 20, anchor="middle") for tick in across.ticks()]
    parts.append(text("MB", WIDTH - RIGHT, height - 8, anchor="end"))
    points = " ".join(f"{x(size):.1f},{y(kl):.1f}" for size, kl in sorted(best))
    parts.append(tag("polyline", points=points, fill="none", stroke=COOL, stroke_width=2))
    parts += [dot(x(size), y(kl), COOL, f"planned: {size:.2f} MB, {kl:.2g}") for size, kl in best]
    for name, size, kl in uniform:
        square = tag("rect", x=round(x(size) - 5, 1), y=round(y(kl) - 5, 1), width=10, height=10, fill=INK)
        is_last = across.share(size) > 0.8
        place = {"x": x(size) + (-10 if is_last else 10), "y": y(kl) + (20 if is_last else -10)}
        parts += [square, text(f"all in {name}", **place, anchor="end" if is_last else "start", fill=INK)]
    size = plan.predicted["bytes"] / 1e6
    said = f"one of the plans, measured: {measured:.2g}"
    parts.append(dot(x(size), y(measured), WARM, said, 6))
    parts.append(text(said, x(size) + 12, y(measured) - 8, fill=WARM, weight=600))
    return picture("Size against KL of planned and uniform models", height, parts)


def grid_across(axis: Axis, y: Callable[[float], float], name: str) -> list[Markup]:
    """Return the ticks and lines of an upright axis, and its name."""
    parts: list[Markup] = [text(name, 12, 24, fill=INK)]
    for tick in axis.ticks():
        parts += [line(LEFT, y(tick), WIDTH - RIGHT, y(tick)), text(number(tick), LEFT - 8, y(tick) + 5, anchor="end")]
    return parts


def drawings() -> dict[str, str]:
    """Return each picture by the name of its file."""
    swept = klfast.Sensitivities.from_json(RESULTS / "sensitivities.json")
    plan, card = klfast.Plan.from_json(RESULTS / "plan.json"), klfast.Comparison.from_json(RESULTS / "card.json")
    return {
        "one_layer.svg": one_layer(),
        "per_layer.svg": per_layer(swept),
        "noise.svg": noise(swept),
        "front.svg": front(swept, plan, card.figures["Mean KLD"].value),
    }


def main() -> None:
    """Write the pictures."""
    IMAGES.mkdir(exist_ok=True)
    for name, drawn in drawings().items():
        (IMAGES / name).write_text(f"{drawn}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
