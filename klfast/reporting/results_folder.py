"""The files of klfast in a folder: sensitivities, plans, comparisons and fronts, known by their schemas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klfast.core.errors import InvalidInputError
from klfast.core.io import parse_json
from klfast.evaluation import comparison, front
from klfast.planning import plan_file
from klfast.sensitivity import kl_ssm_quant, results


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

        A file that is named is taken for sensitivities unless it says that it is something else. Of folders without
        files of klfast sweep, those that were published as kl-ssm-quant's are taken.

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
        published: list[Path] = []
        for path in paths:
            if path.is_dir():
                for file in sorted(path.glob("*.json")):
                    data = _parsed(file)
                    unnamed = published if kl_ssm_quant.is_published(data) else []
                    by_schema.get(_schema(data), unnamed).append(file)
            else:
                by_schema.get(schema(path), found.sensitivities).append(path)
        found.sensitivities.extend([] if found.sensitivities else published)
        if not found.sensitivities:
            raise InvalidInputError(
                f"there are no sensitivities in {', '.join(map(str, paths))}; run klfast sweep first"
            )
        return found


def schema(path: Path) -> str:
    """Return the schema that a file names; empty for anything else, which its reader will judge."""
    return _schema(_parsed(path))


def _parsed(path: Path) -> object:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _schema(data: object) -> str:
    return str(data.get("schema", "")) if isinstance(data, dict) else ""
