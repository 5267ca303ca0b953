"""Names of the suites of bench/; imports nothing, so that the command line is fast."""

from __future__ import annotations

SUITES = ("linear", "divergence", "scan", "sweep", "decode", "families", "hymba", "serve")
