"""csrc/ into python, core, simd, gemm, prepared and the five families."""

from __future__ import annotations

import re
from pathlib import Path

import tables
from move import Plan, apply_fixups, begin, git, move_files, rewrite_text

INCLUDE = re.compile(r'(\s*#\s*include\s+)"([^"]+)"(.*)')


def move(root: Path) -> Plan:
    tree = begin(root)
    sources = {name for name in tree.files if name.startswith("csrc/")}
    paths = {old: new for old, new in tables.CSRC.items() if old in sources}
    plan = Plan(tree, {}, {}, paths, tree.public())
    for name in sorted(sources - paths.keys()):
        plan.say(name, "is in no table: it stays where it is")
    plan.folders = tables.CSRC_FOLDERS
    plan.unsorted = []
    for path in tree.text:
        text = new = tree.read(path)
        if path in sources:
            new = rewrite_includes(plan, path, new)
        if path in sources or path in ("docs/KERNEL_NOTES.md", "bench/NOTES.md"):
            new = rewrite_mentions(plan, path, new)
        new = rewrite_text(plan, new, path)
        if new != text:
            tree.write(path, new)
    if plan.unsorted:
        plan.say(f"{len(plan.unsorted)} files of csrc/", "#include lines that were sorted no longer are; clang-format (SortIncludes) or leave it: the order is as before")
    git(root, "add", "-u")
    move_files(plan)
    apply_fixups(plan, tables.CSRC_FIXUPS)
    git(root, "add", "-A")
    return plan


def rewrite_includes(plan: Plan, path: str, text: str) -> str:
    """#include "..." by the table, in the order that they have: what the compiler reads stays the same, comments apart."""
    lines = text.splitlines(keepends=True)
    at = unsorted = 0
    while at < len(lines):
        end = at
        while end < len(lines) and INCLUDE.match(lines[end]):
            end += 1
        if end > at:
            old = lines[at:end]
            new = [INCLUDE.sub(lambda m: f'{m[1]}"{place(plan, path, m[2])}"{m[3]}', line) for line in old]
            unsorted += old == sorted(old) and new != sorted(new)
            lines[at:end] = new
        at = end + 1
    if unsorted:
        plan.unsorted.append(path)
    return "".join(lines)


def place(plan: Plan, path: str, name: str) -> str:
    for full in (f"csrc/{name}", (Path(path).parent / name).as_posix()):
        if full in plan.paths:
            return plan.paths[full].removeprefix("csrc/")
    if not any((plan.tree.root / folder / name).is_file() for folder in ("csrc", Path(path).parent)):
        plan.say(path, f'#include "{name}": there is no such file')
    return name


def rewrite_mentions(plan: Plan, path: str, text: str) -> str:
    """folder/file.h, and file.h alone, in comments and notes, seen from csrc/; not in #include lines, which are done."""
    short = {old.removeprefix("csrc/"): new.removeprefix("csrc/") for old, new in plan.paths.items() if old.count("/") > 1}
    every = [Path(old).name for old in plan.paths]
    for old, new in plan.paths.items():
        here = Path(old).parent == Path(path).parent
        if Path(old).name != Path(new).name and (here or (every.count(Path(old).name) == 1 and not old.endswith(("bindings.h", "bindings.cpp")))):
            short[Path(old).name] = Path(new).name
    pattern = re.compile(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, sorted(short, key=len, reverse=True)))})(?!\w)")
    return "".join(line if INCLUDE.match(line) else pattern.sub(lambda m: short[m[0]], line) for line in text.splitlines(keepends=True))
