"""tests/ into folders that mirror the package; helpers into tests/support."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import tables
from move import Plan, apply_fixups, begin, git, move_files, rewrite_file_paths, rewrite_text


def move(root: Path) -> Plan:
    tree = begin(root)
    paths = {old: new for old, new in tables.TESTS.items() if old in tree.files}
    for name in tree.files:
        for old, new in tables.TEST_FOLDERS.items():
            if name.startswith(old + "/"):
                paths[name] = new + name[len(old) :]
    plan = Plan(tree, {}, {}, paths, tree.public())
    plan.folders = tables.TEST_FOLDERS
    for old in tables.TESTS.keys() - paths.keys():
        plan.say(old, "is in the table and not in the tree")
    for name in tree.files:
        if name.startswith("tests/") and name.endswith(".py") and name not in paths and name not in tables.TEST_STAYS:
            plan.say(name, "is in no table: it stays where it is")
    by_name = defaultdict(list)
    for name in tree.files:
        new = paths.get(name, name)
        if new.startswith("tests/") and Path(new).name.startswith("test_") and new.endswith(".py"):
            by_name[Path(new).name].append(new)
    for name, places in by_name.items():
        if len(places) > 1:
            raise SystemExit(f"two files called {name}, which pytest's default import mode refuses: {places}")
    renamed = {Path(old).stem: Path(new).stem for old, new in paths.items() if Path(old).stem != Path(new).stem}
    pattern = re.compile(rf"\b(from|import) ({'|'.join(map(re.escape, renamed))})\b")
    importers = defaultdict(set)  # folder whose modules are imported -> by folders elsewhere
    where = {Path(new).stem: str(Path(new).parent) for new in paths.values() if new.endswith(".py")}
    for path in tree.text:
        text = new = tree.read(path)
        if path.startswith("tests/") and path.endswith(".py"):
            new = pattern.sub(lambda m: f"{m[1]} {renamed[m[2]]}", new)
            for node in ast.walk(ast.parse(new)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    here = str(Path(paths.get(path, path)).parent)
                    if name in where and where[name] != here:
                        importers[where[name]].add(f"{paths.get(path, path)} imports {name}")
            if path in paths:
                new = rewrite_file_paths(plan, path, paths[path], new)
        new = rewrite_text(plan, new, path)
        if new != text:
            tree.write(path, new)
    for folder, users in importers.items():
        if folder not in tables.PYTHONPATH:
            plan.say(folder, f"is not on pytest's pythonpath, but {'; '.join(sorted(users))}")
    git(root, "add", "-u")
    move_files(plan)
    apply_fixups(plan, tables.TEST_FIXUPS)
    text = tree.read("pyproject.toml")
    line = "pythonpath = [" + ", ".join(f'"{name}"' for name in tables.PYTHONPATH) + "]"
    new = re.sub(r'^(testpaths = \["tests"\]\n)(?!pythonpath)', rf"\1{line}\n", text, flags=re.M)
    if new == text and line not in text:
        plan.say("pyproject.toml", f"[tool.pytest.ini_options] should have {line}")
    tree.write("pyproject.toml", new)
    git(root, "add", "-A")
    return plan
