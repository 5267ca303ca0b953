"""``klfast doctor --device``: every kernel on one device against klfast's reference, and a short bench; see report.py."""
