"""Names of single experts' matrices: "...experts.gate_up_proj.17" is expert 17 of the stack "...experts.gate_up_proj".

A stack may have one precision, or each of its experts one of its own. Sweeps, plans and files name what has its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_EXPERT = re.compile(r"((?:.*\.)?experts\.\w+)\.(\d{1,9})")


def expert_name(stack: str, expert: int) -> str:
    """Return the name of one expert's matrix in a stack."""
    return f"{stack}.{expert}"


def expert_in(name: str) -> tuple[str, int] | None:
    """Return the stack and the number of the expert that a name is of; None for any other name."""
    found = _EXPERT.fullmatch(name)
    return None if found is None else (found[1], int(found[2]))


def stack_in(name: str) -> str:
    """Return the stack of a single expert's name, and any other name as it is."""
    found = expert_in(name)
    return name if found is None else found[0]


def stacked(names: Iterable[str]) -> list[str]:
    """Return names with each stack once in the place of its experts, in the order of their first."""
    return list(dict.fromkeys(map(stack_in, names)))
