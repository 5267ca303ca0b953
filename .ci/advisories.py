"""Look packages up among the advisories of PyPI's project pages: ``pip freeze | python .ci/advisories.py``.

For where pip-audit gets no pages of single versions. A project's page has the advisories of its newest version alone,
so nothing is learnt of packages that are older. Exit code 1 if there is an advisory, 2 if no page can be had.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from pip._internal.models.index import PyPI


def page(name: str) -> dict | None:
    """Return what the index says of a project; None if it has no page that can be had."""
    try:
        with urllib.request.urlopen(f"{PyPI.pypi_url}/{name}/json", timeout=30) as answer:
            found: dict = json.load(answer)
            return found
    except (OSError, ValueError):
        return None


def main() -> int:
    """Read lines NAME==VERSION from standard input; others are left out."""
    pinned = [line.strip().partition("==")[::2] for line in sys.stdin if "==" in line]
    with ThreadPoolExecutor(6) as threads:
        pages = list(threads.map(page, [name for name, _ in pinned]))
    if not any(pages):
        print("no project's page can be had", file=sys.stderr)
        return 2
    newest = [
        (name, version, found["vulnerabilities"])
        for (name, version), found in zip(pinned, pages, strict=True)
        if found is not None and found["info"]["version"] == version
    ]
    advisories = [(name, version, each) for name, version, every in newest for each in every if not each["withdrawn"]]
    for name, version, each in advisories:
        print(f"{name} {version}: {each['id']} {' '.join((each['summary'] or each['details']).split())[:200]}")
    print(
        f"{len(advisories)} advisories on {len(newest)} packages; "
        f"nothing is known of {len(pinned) - len(newest)} others"
    )
    return bool(advisories)


if __name__ == "__main__":
    sys.exit(main())
