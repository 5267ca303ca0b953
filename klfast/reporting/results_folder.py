"""The files of klfast in a folder: sensitivities, plans, comparisons and fronts, known by their schemas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klfast.core.errors import InvalidInputError
from klfast.core.io import parse_json
from klfast.evaluation import comparison, front
from klfast.planning import plan_file
from klfast.sensitivity import results


@dataclass(frozen=True)
class ResultFiles:
    """Paths by what they hold."""

    sensitivities: list[Path]
    plans: list[Path]
    comparisons: list[Path]
    fronts: list[Path]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> ResultFiles:
        """Return the files among ``paths`` and, of those that are folders, the .json files of klfast in them.

        A file that is named is taken for sensitivities unless it says that it is something else.

        Raises:
            InvalidInputError: there are no sensitivities.
        """
        found = cls([], [], [], [])
        by_schema = {
            results.SCHEMA: found.sensitivities,
            plan_file.SCHEMA: found.plans,
            comparison.SCHEMA: found.comparisons,
            front.SCHEMA: found.fronts,
        }
        for path in paths:
            if path.is_dir():
                for file in sorted(path.glob("*.json")):
                    by_schema.get(schema(file), []).append(file)
            else:
                by_schema.get(schema(path), found.sensitivities).append(path)
        if not found.sensitivities:
            raise InvalidInputError(
                f"there are no sensitivities in {', '.join(map(str, paths))}; run klfast sweep first"
            )
        return found


def schema(path: Path) -> str:
    """Return the schema that a file names; empty for anything else, which its reader will judge."""
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return ""
    return str(data.get("schema", "")) if isinstance(data, dict) else ""
