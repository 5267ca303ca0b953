"""The models and texts bundled with klfast."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"


def bundled_models() -> list[str]:
    """Return the names of the bundled models."""
    folder = ASSETS / "models"
    return sorted(p.name for p in folder.iterdir() if (p / "config.json").is_file()) if folder.is_dir() else []
