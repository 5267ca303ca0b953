"""The models and texts that come with klfast."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"


def bundled_models() -> list[str]:
    """Names of the models that come with klfast."""
    folder = ASSETS / "models"
    return sorted(p.name for p in folder.iterdir() if (p / "config.json").is_file()) if folder.is_dir() else []
