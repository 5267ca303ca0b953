"""The suites of bench/, by name; imports nothing, so that the command line can name them at once."""

from __future__ import annotations

SUITES = ("linear", "divergence", "scan", "sweep", "decode", "hymba")
