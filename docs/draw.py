"""Draw what ARCHITECTURE.md shows, from the code: imports between the packages, and the implementations of each op.

    .venv/bin/python docs/draw.py            writes the drawings between their marks in docs/ARCHITECTURE.md
    .venv/bin/python docs/draw.py --check    exits with 1 if they are not current

Needs the package grimp, which import-linter brings (make lint).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import grimp
import tomllib

from klfast.backends import triton

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "ARCHITECTURE.md"


def layers() -> list[list[str]]:
    """Return the layers of pyproject.toml's import contract, from top to bottom."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = project["tool"]["importlinter"]["contracts"]
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def imports() -> str:
    """Draw a Mermaid flowchart of the packages; an arrow that a chain of others implies is left out."""
    graph = grimp.build_graph("klfast", exclude_type_checking_imports=True)
    order = layers()
    names = [name for layer in order for name in layer]
    uses: dict[str, set[str]] = {name: set() for name in names}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            source, target = (part.split(".")[1] if "." in part else "" for part in (module, imported))
            if source in uses and target in uses and source != target:
                uses[source].add(target)
    below: dict[str, set[str]] = {}
    for name in reversed(names):
        below[name] = uses[name].union(*(below[target] for target in uses[name]))
    lines = ["```mermaid", "flowchart TD"]
    for layer in order:
        lines += [f"    {name}" for name in layer]
    for name in names:
        direct = uses[name] - set().union(*(below[target] for target in uses[name]))
        lines += [f"    {name} --> {target}" for target in sorted(direct, key=names.index)]
    return "\n".join([*lines, "```"])


def kernel_tiers() -> dict[str, str]:
    """Return the tiers of each op's kernels as the sources list them, whichever of them this compiler builds."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "csrc").rglob("tiers.cpp")):
        text = path.read_text(encoding="utf-8")
        for tiers in re.findall(r"^#define KLFAST_TIERS (.*)$", text, re.MULTILINE):
            ops = re.findall(r'^KLFAST_DISPATCH\((\w+),|\bannounce_\w+\{"(\w+)"', text, re.MULTILINE)
            found |= {dispatched or announced: tiers for dispatched, announced in ops}
    return found


def implementations() -> str:
    """Draw a Mermaid flowchart from each op to the tiers that have a kernel of it, and to Triton."""
    lines = ["```mermaid", "flowchart LR"]
    for op, tiers in sorted(kernel_tiers().items()):
        lines.append(f"    {op} --> cpu_{op}[{tiers}]")
        if op in triton.KERNELS:
            lines.append(f"    {op} --> triton_{op}[Triton]")
    return "\n".join([*lines, "```"])


def main() -> None:
    """Write or check the drawings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a drawing is not current")
    asked = parser.parse_args()
    before = page = PAGE.read_text(encoding="utf-8")
    for name, draw in (("imports", imports), ("implementations", implementations)):
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = mark.sub(lambda found, draw=draw: f"{found[1]}{draw()}\n{found[2]}", page)
    if asked.check:
        sys.exit(f"{PAGE.name} does not show the code as it is; run docs/draw.py" if page != before else 0)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
