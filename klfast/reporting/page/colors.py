"""Colours of cells on a light and on a dark page, with text that can be read on them (WCAG 2.2: 4.5 to 1)."""

from __future__ import annotations

from collections.abc import Sequence

_Rgb = tuple[float, float, float]
HEAT = (("fff8ef", "fdd5a2", "f88b55", "cf2f1e", "6d0606"), ("211a18", "5c2a1a", "a8431d", "ee8b4d", "ffe7cb"))
DEPTH = (("f1f6fb", "b9d5ec", "5f9fd0", "1f66a8", "0a2c5c"), ("171d25", "1f3f5f", "2f6ea3", "72b3de", "e2f3ff"))


def style(share: float, ramp: Sequence[Sequence[str]] = HEAT) -> str:
    """Return the CSS variables of a cell whose value lies at ``share``, 0 to 1, of a ramp for light and for dark."""
    light, dark = (_between(stops, share) for stops in ramp)
    return f"--l:{light};--lt:{readable_on(light)};--d:{dark};--dt:{readable_on(dark)}"


def readable_on(color: str) -> str:
    """Return black or white, whichever contrasts more with a colour such as "#fdd5a2"."""
    return max(("#000000", "#ffffff"), key=lambda text: contrast(text, color))


def contrast(first: str, second: str) -> float:
    """Return the contrast ratio of two colours, 1 to 21."""
    low, high = sorted(map(_luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in _rgb(color[1:])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _between(stops: Sequence[str], share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    mixed = (
        round(255 * (a + (b - a) * (place - first)))
        for a, b in zip(_rgb(stops[first]), _rgb(stops[first + 1]), strict=True)
    )
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _rgb(digits: str) -> _Rgb:
    red, green, blue = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return red, green, blue
