#!/usr/bin/env python3
"""Move klfast's files into the layout by layers, mechanically, at any commit.

    move.py ROOT --names    single names move first, in the flat layout: breaks the circles between the packages to come
    move.py ROOT            klfast/ (and what of bench/ belongs there) into its packages
    move.py ROOT --csrc     csrc/
    move.py ROOT --tests    tests/ into folders that mirror the package
    move.py ROOT --names --table FILE    further names by a table of yours, in either layout (for splitting modules afterwards)
    move.py ROOT --check    changes nothing: do all imports, attributes of modules, dotted names and #include lines resolve?

Each of the four is one commit (it stages, and does not commit); the tree must have no changes of its own. F_PLAN.md says the rest.
What the tool could not decide is listed at the end. Standard library only; nothing of klfast is imported.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import io
import keyword
import re
import subprocess
import sys
import textwrap
import tokenize
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import tables

WIDTH = 120
TEXT_SUFFIXES = {".py", ".md", ".toml", ".cfg", ".cpp", ".h", ".cl", ".yml", ".yaml", ".in", ".txt", ".ini", ".sh"}
TEXT_NAMES = {"Makefile", "MANIFEST.in", "run", "newer_ocloc", "verify_xpu", ".clang-format", ".git-blame-ignore-revs"}
UNTOUCHED = re.compile(r"^(klfast/assets/|bench/results/|tests/golden/|shared/|constraints\.txt$|LICENSE$)")


# An import statement of klfast's inside other text.
STATEMENT = re.compile(
    r"(?<![\w.])(?:from\s+(?:klfast|bench)[\w.]*\s+import\s+\w+(?:\s+as\s+\w+)?(?:,\s*\w+(?:\s+as\s+\w+)?)*|import\s+klfast[\w.]*(?:\s+as\s+\w+)?)"
)


# ------------------------------------------------------------------------------------------------------------- the tree
class Tree:
    """The tracked files of a checkout, and which module each Python file is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = [name for name in git(root, "ls-files", "-z").split("\0") if name and (root / name).is_file()]
        self.modules = {dotted: name for name in self.files if (dotted := dotted_of(name))}
        self._trees: dict[str, ast.Module] = {}

    @property
    def python(self) -> list[str]:
        return [name for name in self.files if name.endswith(".py") and not UNTOUCHED.match(name)]

    @property
    def text(self) -> list[str]:
        return [
            name for name in self.files
            if not UNTOUCHED.match(name) and (Path(name).suffix in TEXT_SUFFIXES or Path(name).name in TEXT_NAMES)
        ]

    def read(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def parsed(self, name: str) -> ast.Module:
        if name not in self._trees:
            self._trees[name] = ast.parse(self.read(name), name)
        return self._trees[name]

    def public(self) -> dict[str, str]:
        """klfast's _PUBLIC table: name -> module, without "klfast."."""
        for node in self.parsed("klfast/__init__.py").body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC":
                return ast.literal_eval(node.value)
        raise SystemExit("klfast/__init__.py has no table _PUBLIC")


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout


def dotted_of(path: str) -> str | None:
    """The module that a file is: bench/ is klfast.bench, kernels/triton/ klfast.kernels."""
    if not path.endswith(".py"):
        return None
    for folder, package in (("klfast/", "klfast"), ("bench/", "klfast.bench"), ("kernels/triton/", "klfast.kernels")):
        if path.startswith(folder):
            parts = [package, *path[len(folder) : -3].split("/")]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return None


@dataclass
class Plan:
    """What moves in this run, in terms of modules."""

    tree: Tree
    modules: dict[str, str]  # old dotted -> new dotted, whole modules
    names: dict[tuple[str, str], tuple[str, str]]
    paths: dict[str, str]  # old path -> new path
    public: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, dict[str, str]] = field(default_factory=dict)  # old module -> local names of modules that changed in it
    report: list[str] = field(default_factory=list)

    def is_module(self, dotted: str) -> bool:
        return dotted in self.tree.modules or dotted in self.new_modules

    @property
    def new_modules(self) -> set[str]:
        return {new for new, _ in self.names.values()}

    def place(self, module: str) -> str:
        return self.modules.get(module, module)

    def place_name(self, module: str, name: str) -> tuple[str, str]:
        if (module, name) in self.names:
            return self.names[module, name]
        return self.place(module), name

    def say(self, where: str, what: str) -> None:
        self.report.append(f"{where}: {what}")


# ------------------------------------------------------------------------------------------------------ rewriting Python
class Source:
    """Text with edits by AST positions."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.bytes = text.encode()
        self.starts = [0]
        for line in self.bytes.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.edits: list[tuple[int, int, str]] = []

    def offset(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def at(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.bytes[start:end].decode()

    def replace(self, start: int, end: int, new: str) -> None:
        self.edits.append((start, end, new))

    def chunks(self) -> list[tuple[str, bool]]:
        """The text after the edits, in pieces; True for what was put in."""
        found, last = [], 0
        for start, end, new in sorted(self.edits):
            if start < last:
                raise ValueError(f"edits overlap at byte {start}: {new!r}")
            found += [(self.bytes[last:start].decode(), False), (new, True)]
            last = end
        return [*found, (self.bytes[last:].decode(), False)]


def class_fields(tree: ast.AST) -> set[int]:
    """The Name nodes that classes' bodies assign to, where these look nothing up by that name: fields of dataclasses, for the most part."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        looked_up = {n.id for s in node.body if not isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        for statement in node.body:
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target] if isinstance(statement, ast.AnnAssign) else []:
                if isinstance(target, ast.Name) and target.id not in looked_up:
                    found.add(id(target))
    return found


def bindings(tree: ast.AST) -> tuple[dict[str, int], set[str]]:
    """Names that are bound other than by imports (how often), and all names that occur."""
    bound: dict[str, int] = defaultdict(int)
    used: set[str] = set()
    fields = class_fields(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            used.add(node.id)
            if not isinstance(node.ctx, ast.Load) and id(node) not in fields:
                bound[node.id] += 1
        elif isinstance(node, ast.arg):
            bound[node.arg] += 1
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound[node.name] += 1
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound[node.name] += 1
        elif isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
            bound[node.name] += 1
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            for name in node.names:
                bound[name] += 1
    return bound, used | set(bound)


@dataclass
class Item:
    """One name of an import statement. ``module`` is what it was imported from; ``target`` set if the name is a module itself."""

    module: str  # old
    name: str  # old; empty for ``import module``
    asname: str | None
    target: str | None  # old dotted of the module that the name is, or None
    local: str
    new_module: str = ""
    new_name: str = ""
    new_local: str = ""
    relative: bool = False


class Rewriter:
    """One piece of Python: a file, or a string that holds code."""

    def __init__(self, plan: Plan, path: str, text: str, *, is_string: bool = False) -> None:
        self.plan, self.path, self.is_string = plan, path, is_string
        self.source = Source(text)
        self.tree = ast.parse(text)
        self.bound, self.occurring = bindings(self.tree)
        self.fields = class_fields(self.tree)
        self.module = dotted_of(path)
        self.package = None
        if self.module:
            self.package = self.module if path.endswith("__init__.py") else self.module.rpartition(".")[0]
        self.moves_away = plan.paths.get(path, path) != path
        self.statements = [n for n in ast.walk(self.tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        self.items: dict[ast.AST, list[Item]] = {}
        self.local: dict[str, set[str]] = defaultdict(set)  # local name -> modules (old) that it is
        for node in self.statements:
            if items := self._read(node):
                self.items[node] = items
        for items in self.items.values():
            for item in items:
                if item.target:
                    self.local[item.local].add(item.target)
        self.in_fstring = {id(n) for f in ast.walk(self.tree) if isinstance(f, ast.JoinedStr) for n in ast.walk(f) if n is not f}
        self.changed_imports = False
        self.removed_locals: set[str] = set()

    # -- reading
    def _read(self, node: ast.Import | ast.ImportFrom) -> list[Item]:
        plan, found = self.plan, []
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "klfast" or alias.name.startswith("klfast."):
                    target = alias.name if plan.is_module(alias.name) else None
                    found.append(Item("", alias.name, alias.asname, target, alias.asname or alias.name))
                else:
                    found.append(Item("", alias.name, alias.asname, None, alias.asname or alias.name))
            return found if any(i.name.split(".")[0] == "klfast" for i in found) else []
        base, relative = node.module or "", bool(node.level)
        if node.level:
            if not self.package:
                return []
            parts = self.package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
        elif base == "bench" or base.startswith("bench."):
            base, relative = "klfast." + base, True  # the folder, seen from the repository's root: kept as it is written if it stays
        if base != "klfast" and not base.startswith("klfast."):
            return []
        for alias in node.names:
            full = f"{base}.{alias.name}"
            target = full if plan.is_module(full) and not (base == "klfast" and alias.name in plan.public) else None
            found.append(Item(base, alias.name, alias.asname, target, alias.asname or alias.name, relative=relative))
        return found

    # -- deciding
    def decide(self) -> None:
        """New places and local names. Renames of modules that others may look up in this one go into plan.renamed."""
        wanted: dict[str, set[str]] = defaultdict(set)
        for items in self.items.values():
            for item in items:
                if item.target:
                    new = self.plan.place(item.target)
                    if item.name and item.module:
                        item.new_module, _, item.new_name = new.rpartition(".")
                    else:
                        item.new_module, item.new_name = "", new
                elif item.module:
                    item.new_module, item.new_name = self.plan.place_name(item.module, item.name)
                else:
                    item.new_module, item.new_name = "", item.name
                item.new_local = item.local
                if item.module and not item.asname and item.new_name != item.name:
                    wanted[item.local].add(item.new_name)
        self.renames: dict[str, str] = {}
        for local, news in wanted.items():
            every = [i for items in self.items.values() for i in items if i.local == local and i.module]
            new = next(iter(news))
            targets = {i.target or (i.module, i.name) for i in every}
            keep = [i.target for i in every if i.target in tables.KEEPS_LOCAL_NAME]
            if keep:
                continue
            if len(news) > 1 or len(targets) > 1:
                self.plan.say(self.path, f"{local} is {' and '.join(map(str, sorted(targets, key=str)))} in different places: keeps its name (import ... as {local})")
            elif new in self.occurring or any(new == i.local for items in self.items.values() for i in items) or self._is_imported(new):
                self.plan.say(self.path, f"{local} would become {new}, which the file uses for something else: keeps its name (import ... as {local})")
            elif keyword.iskeyword(new) or hasattr(builtins, new):
                self.plan.say(self.path, f"{local} would become {new}, a name of Python's: keeps its name (import ... as {local})")
            elif self.bound.get(local):
                self.plan.say(self.path, f"{local} is bound to something else as well: keeps its name (import ... as {local})")
            else:
                self.renames[local] = new
                for item in every:
                    item.new_local = new
        if self.module and not self.is_string and self.renames:
            top = {i.local for node in self.tree.body for i in self.items.get(node, ())}
            self.plan.renamed[self.module] = {old: new for old, new in self.renames.items() if old in top}

    def _is_imported(self, name: str) -> bool:
        return any(name == (a.asname or a.name).split(".")[0] for n in self.statements for a in n.names)

    # -- writing
    def rewrite(self) -> str:
        self._rewrite_names()
        self._rewrite_attributes()
        for node, items in self.items.items():
            self._rewrite_import(node, items)
        if not self.is_string:
            self._rewrite_strings()
        done = "".join(text if put_in else rewrite_text(self.plan, text, self.path) for text, put_in in self.source.chunks())
        return tidy_imports(done, self.plan, self.path) if self.changed_imports and not self.is_string else done

    def _rewrite_names(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and node.id in self.renames and id(node) not in self.in_fstring | self.fields:
                start, end = self.source.span(node)
                self.source.replace(start, end, self.renames[node.id])
        for node in ast.walk(self.tree):  # positions inside f-strings are not reliable before Python 3.12
            if isinstance(node, ast.JoinedStr) and id(node) not in self.in_fstring:
                inside = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(self.renames)
                attributes = self._fstring_attributes(node)
                if inside or attributes:
                    start, end = self.source.span(node)
                    text = self.source.bytes[start:end].decode()
                    for old, new in attributes.items():
                        text = re.sub(rf"(?<![\w.]){re.escape(old)}\b", new, text)
                    for old in inside:
                        text = re.sub(rf"(?<=\{{)([^{{}}]*?)(?<![\w.]){old}(?=[.(\[,)\}} ])", lambda m, n=self.renames[old]: m[1] + n, text)
                    self.source.replace(start, end, rewrite_text(self.plan, text, self.path))

    def _fstring_attributes(self, node: ast.JoinedStr) -> dict[str, str]:
        found = {}
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and (new := self._moved_attribute(inner)):
                found[f"{inner.value.id}.{inner.attr}"] = new
        return found

    def _moved_attribute(self, node: ast.Attribute) -> str | None:
        """``module.name`` where the name moves on its own: what stands for it now."""
        if not isinstance(node.value, ast.Name) or len(self.local.get(node.value.id, ())) != 1:
            return None
        (module,) = self.local[node.value.id]
        if (module, node.attr) in self.plan.names:
            new_module, new_name = self.plan.names[module, node.attr]
            return f"{self._local_of(new_module, node.value.id)}.{new_name}"
        if node.attr in self.plan.renamed.get(module, {}):
            return f"{self.renames.get(node.value.id, node.value.id)}.{self.plan.renamed[module][node.attr]}"
        return None

    def _local_of(self, module: str, beside: str) -> str:
        """The name that a module has in this file; imported beside another if it is not there yet."""
        for local, targets in self.local.items():
            if targets == {module}:
                return self.renames.get(local, local)
        parent, _, last = module.rpartition(".")
        if self.module == module:
            raise ValueError(f"{self.path} looks up its own name")
        for node, items in self.items.items():
            for item in items:
                if item.local == beside and item.target and item.module:
                    items.append(Item(parent, last, None, module, last, parent, last, last))
                    self.local[last].add(module)
                    self.changed_imports = True
                    return last
        self.plan.say(self.path, f"needs {module}, import it by hand")
        return last

    def _rewrite_attributes(self) -> None:
        gone: dict[str, int] = defaultdict(int)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and id(node) not in self.in_fstring and (new := self._moved_attribute(node)):
                start, end = self.source.span(node)
                self.source.edits = [e for e in self.source.edits if not (start <= e[0] and e[1] <= end)]
                self.source.replace(start, end, new)
                gone[node.value.id] += 1
            if isinstance(node, ast.Call) and self._is_patch(node):
                owner, name = node.args[0], node.args[1]
                if isinstance(owner, ast.Name) and len(self.local.get(owner.id, ())) == 1:
                    (module,) = self.local[owner.id]
                    new_name = None
                    if (module, name.value) in self.plan.names:
                        new_module, new_name = self.plan.names[module, name.value]
                        start, end = self.source.span(owner)
                        self.source.edits = [e for e in self.source.edits if not (start <= e[0] and e[1] <= end)]
                        self.source.replace(start, end, self._local_of(new_module, owner.id))
                        gone[owner.id] += 1
                    elif name.value in self.plan.renamed.get(module, {}):
                        new_name = self.plan.renamed[module][name.value]
                    if new_name and new_name != name.value:
                        start, end = self.source.span(name)
                        self.source.replace(start, end, f'"{new_name}"')
        for local, count in gone.items():
            uses = sum(isinstance(n, ast.Name) and n.id == local for n in ast.walk(self.tree))
            if uses == count:
                self.removed_locals.add(local)

    @staticmethod
    def _is_patch(node: ast.Call) -> bool:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in ("setattr", "delattr") and len(node.args) >= 2 and isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str)

    def _rewrite_import(self, node: ast.Import | ast.ImportFrom, items: list[Item]) -> None:
        same = len(items) == len(node.names) and all(
            (i.new_module, i.new_name, i.new_local) == (i.module, i.name, i.local) and not (i.relative and self.moves_away and self._is_relative(node)) for i in items
        )
        if same and not (self.removed_locals & {i.local for i in items if i.target}):
            if isinstance(node, ast.Import):  # import klfast.x: positions are exact, keep regexes off it
                start, end = self.source.span(node)
                self.source.replace(start, end, self.source.at(node))
            else:
                start, end = self.source.span(node)
                self.source.replace(start, end, self.source.at(node))
            return
        self.changed_imports = True
        kept = [i for i in items if not (i.target and i.local in self.removed_locals)]
        start, end = self.source.span(node)
        comment, inner, end = self._comments(node, end)
        if inner:
            self.plan.say(f"{self.path}:{node.lineno}", f"comments inside an import statement were dropped: {inner}")
        lines = []
        plain = [i for i in kept if not i.new_module]
        if plain:
            lines.append("import " + ", ".join(i.new_name if i.new_local in (i.new_name, i.name) and not i.asname else f"{i.new_name} as {i.asname}" for i in plain))
        groups: dict[str, list[Item]] = {}
        for item in kept:
            if item.new_module:
                groups.setdefault(self._from(item, node), []).append(item)
        indent = " " * (node.col_offset if self.source.bytes[self.source.starts[node.lineno - 1] : start].strip() == b"" else 0)
        compound = self._is_compound(node, start, end)
        for module, some in groups.items():
            lines += from_lines(module, [(i.new_name, i.new_local) for i in some], indent, one_line=compound, suffix=comment if "noqa" in comment else "")
        if comment and "noqa" not in comment and lines:
            lines[-1] += comment
        elif comment and "noqa" in comment and plain:
            lines[0] += comment
        if not lines:
            self._drop_line(start, end)
            return
        self.source.edits = [e for e in self.source.edits if not (start <= e[0] and e[1] <= end)]
        self.source.replace(start, end, ("; " if compound else f"\n{indent}").join(lines))

    def _drop_line(self, start: int, end: int) -> None:
        text = self.source.bytes
        line = text.rfind(b"\n", 0, start) + 1
        after = text.find(b"\n", end) + 1
        if text[line:start].strip() == b"" and text[end : after - 1].strip() == b"":
            self.source.replace(line, after, "")
        else:
            self.source.replace(start, end, "pass")
            self.plan.say(self.path, "an import became superfluous: `pass` stands there now")

    def _is_relative(self, node: ast.AST) -> bool:
        return isinstance(node, ast.ImportFrom) and node.level > 0

    def _from(self, item: Item, node: ast.ImportFrom) -> str:
        """How the module is spelled in ``from ... import``: as before where it stays."""
        if item.relative and f"{item.new_module}.".startswith("klfast.bench.") and not (self.moves_away and node.level):
            rest = item.new_module[len("klfast.bench") :]
            return f".{rest.lstrip('.')}" if node.level else f"bench{rest}"
        return item.new_module

    def _comments(self, node: ast.AST, end: int) -> tuple[str, list[str], int]:
        """The comment of a statement (behind it, or behind its opening parenthesis), further ones inside, and where it then ends."""
        if self.is_string:
            return "", [], end
        text = self.source.bytes
        stop = text.find(b"\n", end)
        stop = len(text) if stop < 0 else stop
        behind = text[end:stop].decode()
        comment = ""
        if behind.strip().startswith("#"):
            comment, end = "  " + behind.strip(), stop
        inner = []
        if node.end_lineno > node.lineno:
            for line in range(node.lineno, node.end_lineno + 1):
                _, mark, words = text[self.source.starts[line - 1] : self.source.starts[line]].decode().partition("#")
                if mark and not (line == node.end_lineno and comment):
                    if line == node.lineno and not comment:
                        comment = "  #" + words.rstrip()
                    else:
                        inner.append("#" + words.rstrip())
        return comment, inner, end

    def _is_compound(self, node: ast.AST, start: int, end: int) -> bool:
        text = self.source.bytes
        before = text[self.source.starts[node.lineno - 1] : start].decode()
        stop = text.find(b"\n", end)
        behind = text[end : len(text) if stop < 0 else stop].decode()
        return before.strip() != "" or behind.lstrip().startswith(";")

    # -- strings that hold code
    def _rewrite_strings(self) -> None:
        docstrings = {
            id(n.body[0].value) for n in ast.walk(self.tree)
            if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and n.body and isinstance(n.body[0], ast.Expr)
        }
        skip = [self.source.span(n) for n in ast.walk(self.tree) if isinstance(n, ast.Constant) and id(n) in docstrings]
        for token in tokenize.generate_tokens(io.StringIO(self.source.text).readline):
            if token.type != tokenize.STRING or not re.search(r"\b(import|from)\s+(klfast|bench)", token.string):
                continue
            start, end = self._token_span(token)
            if any(a <= start and end <= b for a, b in skip) or any(a < end and start < b for a, b, _ in self.source.edits):
                continue
            new = self._code_in(token.string, token.start[0])
            if new != token.string:
                self.source.replace(start, end, new)

    def _token_span(self, token: tokenize.TokenInfo) -> tuple[int, int]:
        lines = self.source.text.splitlines(keepends=True)
        start = self.source.starts[token.start[0] - 1] + len(lines[token.start[0] - 1][: token.start[1]].encode())
        end = self.source.starts[token.end[0] - 1] + len(lines[token.end[0] - 1][: token.end[1]].encode())
        return start, end

    def _code_in(self, literal: str, line: int) -> str:
        prefix, quote, inner = re.fullmatch(r"([a-zA-Z]*)(\"\"\"|'''|\"|')(.*)\2", literal, re.S).groups()
        if "f" not in prefix.lower():
            try:
                is_raw = ast.literal_eval(literal) == inner
            except (SyntaxError, ValueError):
                is_raw = False
            if is_raw:
                shifted = inner if not inner.lstrip("\n").startswith(" ") else "if 1:\n" + inner
                try:
                    part = Rewriter(self.plan, self.path, shifted, is_string=True)
                except SyntaxError:
                    pass
                else:
                    part.module = part.package = None
                    part.decide()
                    return prefix + quote + part.rewrite()[len(shifted) - len(inner) :] + quote
        pieces, last = [], 0
        for match in STATEMENT.finditer(inner):
            pieces += [rewrite_text(self.plan, inner[last : match.start()], self.path), self._statement_in_text(match)]
            last = match.end()
        new = "".join([*pieces, rewrite_text(self.plan, inner[last:], self.path)])
        if new != inner:
            self.plan.say(f"{self.path}:{line}", "a string with code was rewritten by pattern: look at it")
        return prefix + quote + new + quote

    def _statement_in_text(self, match: re.Match) -> str:
        part = Rewriter(self.plan, self.path, match[0], is_string=True)
        part.module = part.package = None
        part.decide()
        for items in part.items.values():  # uses are elsewhere: local names stay
            for item in items:
                item.new_local = item.local
        part.renames = {}
        for node, items in part.items.items():
            part._rewrite_import(node, items)
        return "".join(text for text, _ in part.source.chunks()).replace("\n", "; ")


def from_lines(module: str, names: list[tuple[str, str]], indent: str = "", *, one_line: bool = False, suffix: str = "") -> list[str]:
    """``from module import ...``; a statement of its own for each name with another local one, as ruff's isort wants it."""
    plain = sorted({name for name, local in names if name == local}, key=name_key)
    lines = []
    if plain:
        line = f"from {module} import {', '.join(plain)}"
        if not one_line and len(indent + line) > WIDTH:
            line = f"from {module} import ({suffix}\n" + "".join(f"{indent}    {name},\n" for name in plain) + f"{indent})"
        else:
            line += suffix
        lines.append(line)
    return lines + [f"from {module} import {name} as {local}{suffix}" for name, local in sorted(set(names)) if name != local]


def name_key(name: str) -> tuple:
    """ruff's order of imported names: constants, classes, the rest, each without regard to case."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2, natural(name), name)


def natural(text: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text.lower())]


def tidy_imports(text: str, plan: Plan, path: str) -> str:
    """Merge and sort runs of klfast's import statements."""
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    runs = []
    for parent in ast.walk(tree):
        for body in (getattr(parent, "body", None), getattr(parent, "orelse", None), getattr(parent, "finalbody", None)):
            if not isinstance(body, list):
                continue
            run: list = []
            for node in [*body, None]:
                fits = isinstance(node, (ast.Import, ast.ImportFrom)) and is_ours(node) and lines[node.lineno - 1][: node.col_offset].strip() == ""
                if fits and (not run or node.lineno == run[-1].end_lineno + 1):
                    run.append(node)
                    continue
                if len(run) > 1:
                    runs.append(run)
                run = [node] if fits else []
    for run in sorted(runs, key=lambda run: -run[0].lineno):
        first, last = run[0].lineno, run[-1].end_lineno
        new = tidied(run, lines)
        if new is not None:
            lines[first - 1 : last] = new
    return "".join(lines)


def is_ours(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.Import):
        return all(alias.name.split(".")[0] == "klfast" for alias in node.names)
    return not node.level and (node.module or "").split(".")[0] == "klfast"


def tidied(run: list, lines: list[str]) -> list[str] | None:
    indent = " " * run[0].col_offset
    merged: dict[tuple, list] = {}
    for node in run:
        raw = "".join(lines[node.lineno - 1 : node.end_lineno])
        comment = ""
        if "#" in raw:
            found = re.findall(r"#.*", raw)
            if len(found) > 1:
                return None
            comment = "  " + found[0]
        if isinstance(node, ast.Import):
            key = (0, ".".join(a.name for a in node.names), "", comment, raw)
            merged[key] = []
        elif any(alias.asname for alias in node.names):
            merged[1, node.module, "as " + node.names[0].name, comment, raw] = []
        else:
            merged.setdefault((1, node.module, "", comment, ""), []).extend(alias.name for alias in node.names)
    out = []
    def order(entry: tuple) -> tuple:
        (kind, module, first, _, raw), names = entry
        return kind, [natural(part) for part in module.split(".")], name_key(first.removeprefix("as ") or min(names, key=name_key, default="")), raw

    for (kind, module, _, comment, raw), names in sorted(merged.items(), key=order):
        if raw:
            out.append(raw)
        else:
            out += [indent + line + "\n" for line in from_lines(module, [(n, n) for n in names], indent, suffix=comment)]
    return "".join(out).splitlines(keepends=True)


# --------------------------------------------------------------------------------------- dotted names and paths in any text
def rewrite_text(plan: Plan, text: str, path: str) -> str:
    """Dotted names of modules, and paths of files, in code, strings, comments and prose alike."""
    if "klfast" in text:
        text = re.sub(r"(?<![\w.-])klfast((?:\.\w+)+)", lambda m: dotted(plan, m), text)
    for pattern, new in path_patterns(plan):
        text = pattern.sub(new, text)
    return text


def dotted(plan: Plan, match: re.Match) -> str:
    parts = match[1][1:].split(".")
    if parts[0] in plan.public:
        return match[0]
    for count in range(len(parts), 0, -1):
        module = ".".join(["klfast", *parts[:count]])
        if module not in plan.tree.modules:
            continue
        rest = parts[count:]
        if rest and (module, rest[0]) in plan.names:
            new_module, new_name = plan.names[module, rest[0]]
            return ".".join([new_module, new_name, *rest[1:]])
        if rest and rest[0] in plan.renamed.get(module, {}):
            rest = [plan.renamed[module][rest[0]], *rest[1:]]
        return ".".join([plan.place(module), *rest])
    return match[0]


def path_patterns(plan: Plan) -> list[tuple[re.Pattern, str]]:
    if not hasattr(plan, "_patterns"):
        found = []
        changed = {old: new for old, new in plan.paths.items() if old != new}
        if changed:
            every = "|".join(re.escape(old) for old in sorted(changed, key=len, reverse=True))
            found.append((re.compile(rf"(?<![\w/.-])(?:{every})(?!\w)"), lambda m: changed[m[0]]))
        folders = getattr(plan, "folders", {})
        if folders:
            every = "|".join(re.escape(old) for old in sorted(folders, key=len, reverse=True))
            found.append((re.compile(rf"(?<![\w/.-])(?:{every})(?![\w.-])"), lambda m: folders[m[0]]))
        plan._patterns = found
    return plan._patterns


# ------------------------------------------------------------------------------------------------------- Path(__file__)
def rewrite_file_paths(plan: Plan, old: str, new: str, text: str) -> str:
    """``Path(__file__).parent`` and its like in a file that moves: the same folder as before, or where its content went."""
    if "__file__" not in text or Path(old).parent == Path(new).parent:
        return text
    source = Source(text)
    tree = ast.parse(text)
    parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Name) and node.id == "__file__"):
            continue
        call = parents[id(node)]
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Path" and len(call.args) == 1):
            plan.say(f"{new}:{node.lineno}", f"__file__ of a moved file: {text.splitlines()[node.lineno - 1].strip()}")
            continue
        here, folder = call, Path("/root/of/the/repository", old)
        resolved = ""
        while True:
            up = parents[id(here)]
            if isinstance(up, ast.Attribute) and up.attr == "resolve":
                here, resolved = parents[id(up)], ".resolve()"
            elif isinstance(up, ast.Attribute) and up.attr == "parent":
                here, folder = up, folder.parent
            elif isinstance(up, ast.Attribute) and up.attr == "parents" and isinstance(parents[id(up)], ast.Subscript):
                here = parents[id(up)]
                folder = list(folder.parents)[here.slice.value] if here.slice.value < len(folder.parents) else None
            else:
                break
            if folder is None:
                break
        if folder is None or folder == Path("/root/of/the/repository", old):
            plan.say(f"{new}:{node.lineno}", f"__file__ of a moved file: {text.splitlines()[node.lineno - 1].strip()}")
            continue
        rest = []
        top = here
        while isinstance(parents[id(top)], ast.BinOp) and isinstance(parents[id(top)].op, ast.Div) and parents[id(top)].left is top:
            right = parents[id(top)].right
            if not (isinstance(right, ast.Constant) and isinstance(right.value, str)):
                break
            top = parents[id(top)]
            rest.append(right.value)
        target = folder.joinpath(*rest)
        inside = target.relative_to("/root/of/the/repository").as_posix() if target.is_relative_to("/root/of/the/repository") else ""
        moved = moved_path(plan, inside)
        if moved == inside:
            top, target = here, folder  # only the way up changes
        else:
            target = Path("/root/of/the/repository", moved)
        up = 0
        base = Path("/root/of/the/repository", new).parent
        while not (target == base or base in target.parents):
            base, up = base.parent, up + 1
        expression = f"Path(__file__){resolved}" + (".parent" if up == 0 else f".parents[{up}]")
        expression += "".join(f' / "{part}"' for part in target.relative_to(base).parts)
        start, end = source.span(top)
        source.replace(start, end, expression)
    return "".join(part for part, _ in source.chunks())


def moved_path(plan: Plan, path: str) -> str:
    if path in plan.paths:
        return plan.paths[path]
    folders = {**getattr(plan, "folders", {}), **getattr(plan, "file_folders", {})}
    return folders.get(path, path)


# ---------------------------------------------------------------------------------------------------------- the four moves
def begin(root: Path) -> Tree:
    if git(root, "status", "--porcelain", "--untracked-files=no").strip():
        raise SystemExit(f"{root} has changes of its own; commit or stash them first")
    return Tree(root)


def rewrite_python(plan: Plan) -> None:
    """All Python files: first what each decides on, so that others can follow, then the text."""
    rewriters = {}
    for path in plan.tree.python:
        rewriters[path] = Rewriter(plan, path, plan.tree.read(path))
        rewriters[path].decide()
    for path, rewriter in rewriters.items():
        new = rewriter.rewrite()
        if path == "klfast/__init__.py":
            new = rewrite_public(plan, new)
        ast.parse(new, path)
        if new != rewriter.source.text:
            plan.tree.write(path, new)


def rewrite_other(plan: Plan) -> None:
    for path in plan.tree.text:
        if path.endswith(".py"):
            continue
        text = plan.tree.read(path)
        new = rewrite_text(plan, text, path)
        if new != text:
            plan.tree.write(path, new)


def rewrite_public(plan: Plan, text: str) -> str:
    source = Source(text)
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC":
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                new_module, new_name = plan.place_name(f"klfast.{value.value}", key.value)
                if new_name != key.value:
                    plan.say("klfast/__init__.py", f"{key.value} is called {new_name} now")
                start, end = source.span(value)
                source.replace(start, end, f'"{new_module.removeprefix("klfast.")}"')
    return "".join(part for part, _ in source.chunks())


def move_files(plan: Plan) -> None:
    """git mv, by way of a name beside, so that a module can become a folder of its own name."""
    root, steps = plan.tree.root, []
    for number, (old, new) in enumerate(sorted(plan.paths.items())):
        if old != new:
            beside = f".house-{number}"
            git(root, "mv", old, beside)
            steps.append((beside, new))
    for beside, new in steps:
        if (root / new).exists():
            raise SystemExit(f"{new} exists already")
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        git(root, "mv", beside, new)
    for folder in sorted({str(Path(old).parent) for old in plan.paths}, key=len, reverse=True):
        path = root / folder
        if path.is_dir() and not any(entry.name != "__pycache__" for entry in path.iterdir()):
            for left in (path / "__pycache__").glob("*.pyc"):
                left.unlink()
            if (path / "__pycache__").is_dir():
                (path / "__pycache__").rmdir()
            path.rmdir()


def apply_fixups(plan: Plan, fixups: list[tuple[str, str, str]]) -> None:
    for path, old, new in fixups:
        if not (plan.tree.root / path).is_file():
            plan.say(path, f"is not there, so this was not applied: {old!r} -> {new!r}")
            continue
        text = plan.tree.read(path)
        if new in text:  # applied before, or not needed
            continue
        if old in text:
            plan.tree.write(path, text.replace(old, new, 1))
        else:
            plan.say(path, f"does not hold {old!r}; by hand: {new!r}")


def packages_in_pyproject(plan: Plan) -> None:
    root = plan.tree.root
    text = plan.tree.read("pyproject.toml")
    found = {".".join(path.parent.relative_to(root).parts) for path in (root / "klfast").rglob("__init__.py")} | {"klfast.bench", "klfast.kernels"}
    listed = "packages = [\n" + "".join(f'  "{name}",\n' for name in sorted(found)) + "]"
    new, count = re.subn(r"packages = \[\n(?:\s*\"[\w.]+\",?\n)+\]", listed, text)
    if count != 1:
        plan.say("pyproject.toml", f"no list of packages to replace; it should be {sorted(found)}")
    else:
        plan.tree.write("pyproject.toml", new)


def move_names(root: Path) -> Plan:
    tree = begin(root)
    names = {}
    for (module, name), new in tables.NAMES.items():
        if module not in tree.modules:
            continue
        if defines(tree, module, name):
            names[module, name] = new
        else:
            print(f"note: {module} does not define {name} (moved already?)")
    references = {key: new for key, new in tables.REFERENCES.items() if key[0] in tree.modules}
    plan = Plan(tree, {}, {**names, **references}, {}, tree.public())
    pieces = {key: cut(plan, *key) for key in names}
    for key in references.keys() - names.keys():
        plan.names[key] = references[key]
    # The code itself: out of the old modules, which import what they still use; into the new ones with what it needs.
    texts = {path: tree.read(path) for path in {tree.modules[module] for module, _ in names}}
    for module in {module for module, _ in names}:
        texts[tree.modules[module]] = without(plan, module, [n for m, n in names if m == module], texts[tree.modules[module]])
    for path, text in texts.items():
        tree.write(path, text)
    for (module, name), piece in pieces.items():  # what others look up by way of the old module, as diagnostics.Path
        bound = {a.asname or a.name.split(".")[0] for n in ast.walk(ast.parse(texts[tree.modules[module]])) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        for local in piece.imports.keys() - bound:
            plan.names.setdefault((module, local), (names[module, name][0], local))
    tree._trees.clear()
    rewrite_python(plan)
    rewrite_other(plan)
    for new_module in dict.fromkeys(new for new, _ in names.values()):
        put(plan, new_module, [(key, pieces[key]) for key, new in names.items() if new[0] == new_module])
    apply_fixups(plan, tables.NAME_FIXUPS)
    git(root, "add", "-A")
    return plan


def defines(tree: Tree, module: str, name: str) -> bool:
    return any(name in defined_by(node) for node in tree.parsed(tree.modules[module]).body if not isinstance(node, (ast.Import, ast.ImportFrom)))


def defined_by(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return set()


@dataclass
class Piece:
    text: str
    uses: set[str]  # names that it looks up
    imports: dict[str, str]  # local name -> the import statement of the old module that binds it
    siblings: set[str]  # top-level names of the old module


def cut(plan: Plan, module: str, name: str) -> Piece:
    path = plan.tree.modules[module]
    text, tree = plan.tree.read(path), plan.tree.parsed(path)
    node = next(n for n in tree.body if name in defined_by(n))
    first, last = extent(node, text.splitlines())
    uses = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    for annotation in (n.annotation for n in ast.walk(node) if isinstance(n, (ast.arg, ast.AnnAssign)) and n.annotation):
        uses |= {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
    imports, siblings = {}, set()
    for other in tree.body:
        if isinstance(other, ast.Import):
            imports |= {(a.asname or a.name.split(".")[0]): f"import {a.name}" + (f" as {a.asname}" if a.asname else "") for a in other.names}
        elif isinstance(other, ast.ImportFrom):
            imports |= {(a.asname or a.name): f"from {other.module} import {a.name}" + (f" as {a.asname}" if a.asname else "") for a in other.names}
        else:
            siblings |= defined_by(other)
    lazily = {a.asname or a.name for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    return Piece("\n".join(text.splitlines()[first:last]) + "\n", uses - lazily, {k: v for k, v in imports.items() if k in uses - lazily}, siblings & uses)


def extent(node: ast.stmt, lines: list[str]) -> tuple[int, int]:
    """Lines (from 0, end excluded) of a statement with its decorators and the comment above."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
    while first and lines[first - 1].startswith("#") and not re.match(r"#.*-{20}", lines[first - 1]):
        first -= 1
    return first, node.end_lineno


def without(plan: Plan, module: str, names: list[str], text: str) -> str:
    """The old module without the names that left; imports what it still uses of them, and not what only they used."""
    tree, lines = ast.parse(text), text.splitlines()
    used_before = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    left = [n for n in tree.body if not (defined_by(n) & set(names))]
    for node in sorted((n for n in tree.body if defined_by(n) & set(names)), key=lambda n: -n.lineno):
        first, last = extent(node, lines)
        gap = 0
        while last + gap < len(lines) and not lines[last + gap].strip():
            gap += 1
        above = 0
        while first - above and not lines[first - above - 1].strip():
            above += 1
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and gap == 0:
            lines[first:last] = []
        else:
            lines[first : last + gap] = [] if above >= gap or last + gap == len(lines) else [""] * (gap - above)
    text = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines).rstrip("\n") + "\n")
    still = {n.id for node in left for n in ast.walk(node) if isinstance(n, ast.Name)}
    exported = set(tables.REEXPORTS.get(module, ()))
    listed = next((set(ast.literal_eval(n.value)) for n in left if "__all__" in defined_by(n)), set())
    gone = used_before - still
    text = drop_imports(text, gone, listed)
    wanted = defaultdict(list)
    for name in names:
        new_module, new_name = plan.names[module, name]
        if name in still or name in exported or name in listed:
            wanted[new_module, name in still].append(new_name)
            if new_name != name and name in still:
                text = re.sub(rf"(?<![\w.]){name}\b", new_name, text)
    for (new_module, is_used), some in sorted(wanted.items()):
        line = from_lines(new_module, [(n, n) for n in some], suffix="" if is_used else "  # noqa: F401 (public names of this module)")
        text = add_imports(text, line)
    return text


def drop_imports(text: str, gone: set[str], listed: set[str]) -> str:
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    for node in reversed(tree.body):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or "noqa" in lines[node.lineno - 1]:
            continue
        keep = [a for a in node.names if (a.asname or a.name.split(".")[0]) not in gone or (a.asname or a.name) in listed]
        if len(keep) == len(node.names):
            continue
        new = []
        if keep and isinstance(node, ast.ImportFrom):
            new = [line + "\n" for line in from_lines(node.module, [(a.name, a.asname or a.name) for a in keep])]
        elif keep:
            new = ["import " + ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in keep) + "\n"]
        lines[node.lineno - 1 : node.end_lineno] = new
    text = "".join(lines)
    return re.sub(r"\n{3,}(?=(from|import) )", "\n\n", text)


def add_imports(text: str, statements: list[str]) -> str:
    """Statements among those at the top of a module, each in its group, sorted."""
    for statement in statements:
        tree = ast.parse(text)
        lines = text.splitlines(keepends=True)
        node = ast.parse(statement).body[0]
        top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) and n.lineno < first_code(tree)]
        if any(ast.dump(n) == ast.dump(node) for n in top):
            continue
        group = group_of(node)
        same = [n for n in top if group_of(n) == group]
        if same:
            block = [*same]
            first, last = block[0].lineno, block[-1].end_lineno
            if any(not line.strip() for line in lines[first - 1 : last]):  # a group in several blocks: the last of them
                block = [n for n in block if not any(not line.strip() for line in lines[n.lineno - 1 : last])]
                first = block[0].lineno
            text = "".join([*lines[: first - 1], *grouped([*block, node], lines, statement), *lines[last:]])
        else:
            earlier = [n for n in top if group_of(n) < group]
            later = [n for n in top if group_of(n) > group]
            if earlier:
                at = earlier[-1].end_lineno
                text = "".join([*lines[:at], "\n", statement + "\n", *lines[at:]])
            elif later:
                at = later[0].lineno - 1
                text = "".join([*lines[:at], statement + "\n", "\n", *lines[at:]])
            else:
                at = tree.body[0].end_lineno if ast.get_docstring(tree) else 0
                text = "".join([*lines[:at], "\n", statement + "\n", *lines[at:]])
    return text


def first_code(tree: ast.Module) -> int:
    for node in tree.body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return node.lineno
    return 1 << 30


def group_of(node: ast.Import | ast.ImportFrom) -> int:
    if isinstance(node, ast.ImportFrom) and node.level:
        return 4
    name = (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
    return 0 if name == "__future__" else 1 if name in sys.stdlib_module_names else 3 if name == "klfast" else 2


def grouped(nodes: list, lines: list[str], statement: str) -> list[str]:
    """A block of import statements, the last of them new, merged and sorted."""
    entries: dict[tuple, list[str]] = {}
    for node in nodes:
        raw = statement + "\n" if node is nodes[-1] else "".join(lines[node.lineno - 1 : node.end_lineno])
        kind = 0 if isinstance(node, ast.Import) else 1
        module = node.names[0].name if kind == 0 else node.module
        plain = kind == 1 and "#" not in raw and not any(a.asname for a in node.names)
        if plain:
            entries.setdefault((kind, [natural(p) for p in module.split(".")].__repr__(), module, ""), []).extend(a.name for a in node.names)
        else:
            entries[kind, [natural(p) for p in module.split(".")].__repr__(), module, raw] = []
    out = []
    def order(entry: tuple) -> tuple:
        (kind, _, module, raw), names = entry
        if raw and kind:
            names = [alias.name for alias in ast.parse(raw).body[0].names]
        return kind, [natural(part) for part in module.split(".")], name_key(min(names, key=name_key, default="")), raw

    for (_, _, module, raw), names in sorted(entries.items(), key=order):
        out.append(raw if raw else "".join(line + "\n" for line in from_lines(module, [(n, n) for n in dict.fromkeys(names)])))
    return out


def put(plan: Plan, module: str, pieces: list[tuple[tuple[str, str], Piece]]) -> None:
    """The pieces into their new module, which is made if need be, with the imports that they need."""
    path = module.replace(".", "/") + ".py"
    exists = (plan.tree.root / path).is_file()
    text = plan.tree.read(path) if exists else f'"""{tables.NEW_MODULES[module]}"""\n\nfrom __future__ import annotations\n'
    statements: dict[str, None] = {}
    bodies = []
    moved_here = {name: new for (old, name), (target, new) in plan.names.items() if target == module}
    for (old, name), piece in pieces:
        body = piece.text
        for local, statement in piece.imports.items():
            node = ast.parse(statement).body[0]
            if isinstance(node, ast.ImportFrom) and (node.module, node.names[0].name) in plan.names:
                new_module, new_name = plan.names[node.module, node.names[0].name]
                if new_module == module:
                    continue
                statement = f"from {new_module} import {new_name}"
            statements[statement] = None
        for sibling in piece.siblings - {name}:
            if (old, sibling) in plan.names:
                new_module, new_name = plan.names[old, sibling]
                if new_name != sibling:
                    body = re.sub(rf"(?<![\w.]){sibling}\b", new_name, body)
                if new_module != module:
                    statements[f"from {new_module} import {new_name}"] = None
            else:
                statements[f"from {old} import {sibling}"] = None
                plan.say(path, f"imports {sibling} from {old}, which it came from: see that no circle comes of it")
        if plan.names[old, name][1] != name:
            body = re.sub(rf"(?<![\w.]){name}\b", plan.names[old, name][1], body)
        bodies.append((body, rewrite_text(plan, body, path)))
    if exists:
        tree = ast.parse(text)
        own = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {d for n in tree.body for d in defined_by(n)}
        text = drop_own_imports(text, module, moved_here)
        del own
    constants = [b for _, b in bodies if not re.search(r"^(def|class|@|async)", b, re.M)]
    rest = [b for _, b in bodies if re.search(r"^(def|class|@|async)", b, re.M)]
    if exists:
        text = insert_pieces(text, constants, rest)
    else:
        text = text.rstrip("\n") + "\n" + ("\n" + "".join(constants) if constants else "") + "".join("\n\n" + b for b in rest)
    text = add_imports(text, list(statements))
    ast.parse(text, path)
    plan.tree.write(path, text)


def drop_own_imports(text: str, module: str, moved_here: dict[str, str]) -> str:
    """A module that imported what now lies in it."""
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    for node in reversed(tree.body):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            lines[node.lineno - 1 : node.end_lineno] = []
    return "".join(lines)


def insert_pieces(text: str, constants: list[str], rest: list[str]) -> str:
    """Constants and classes before the module's first function or class, functions at its end."""
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    classes = [b for b in rest if re.search(r"^class ", b, re.M)]
    functions = [b for b in rest if b not in classes]
    at = next((extent(n, [line.rstrip("\n") for line in lines])[0] for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))), len(lines))
    above = at
    while above and not lines[above - 1].strip():
        above -= 1
    if above and re.match(r"#.*-{20}", lines[above - 1]):  # a section's heading belongs to what follows
        at = above - 1
    head = "".join(lines[:at]).rstrip("\n") + "\n"
    tail = "".join(lines[at:])
    middle = ("".join(constants) and "\n" + "".join(constants)) + "".join("\n\n" + b for b in classes)
    return head + middle + ("\n\n" if tail else "") + tail.rstrip("\n") + "\n" + "".join("\n\n" + b for b in functions)


def move_package(root: Path, without_names: bool) -> Plan:
    tree = begin(root)
    paths = {old: new for old, new in tables.MOVES.items() if old in tree.files}
    left = [f"{module}.{name}" for module, name in tables.NAMES if module in tree.modules and defines(tree, module, name)]
    if left and not without_names:
        raise SystemExit(f"run --names first, or modules cannot be imported in every order: {', '.join(left)}")
    plan = Plan(tree, {}, {}, paths, tree.public())
    plan.folders = dict(tables.FOLDERS)
    for old in tables.MOVES.keys() - paths.keys():
        plan.say(old, "is in the table and not in the tree")
    plan.modules = {dotted_of(old): dotted_of(new) for old, new in paths.items() if dotted_of(old) and dotted_of(new)}
    for old in tables.REMOVED:
        if old in tree.files:
            plan.modules[dotted_of(old)] = "klfast.diagnostics"
    public = set(plan.public)
    for new in {n.split("/")[1].removesuffix(".py") for n in (*paths.values(), *tables.PACKAGES) if n.startswith("klfast/")}:
        if new in public:
            raise SystemExit(f"klfast/{new} would hide the public function klfast.{new}")
    for path in tree.files:
        parts = path.split("/")
        if len(parts) == 2 and parts[0] == "klfast" and path.endswith(".py") and path not in paths and parts[1] not in tables.STAYS:
            plan.say(path, "is in no table: it stays where it is")
    rewrite_python(plan)
    for path in tree.python:
        if path in paths:
            text = tree.read(path)
            new = rewrite_file_paths(plan, path, paths[path], text)
            if new != text:
                tree.write(path, new)
    rewrite_other(plan)
    removed = [old for old in tables.REMOVED if old in tree.files]
    if removed:
        git(root, "rm", "-qf", *removed)
    git(root, "add", "-u")
    move_files(plan)
    for folder, docstring in tables.PACKAGES.items():
        if not (root / folder / "__init__.py").exists():
            tree.write(f"{folder}/__init__.py", f'"""{docstring}"""\n')
    for name, docstring in tables.ALIASES.items():
        write_alias(plan, name, docstring)
    apply_fixups(plan, tables.FIXUPS)
    packages_in_pyproject(plan)
    git(root, "add", "-A")
    return plan


def write_alias(plan: Plan, name: str, docstring: str) -> None:
    home = plan.place(f"klfast.{name}")
    path = next(new for old, new in plan.paths.items() if old == f"klfast/{name}.py")
    tree = ast.parse(plan.tree.read(path))
    names = sorted((n for node in tree.body for n in defined_by(node) if not n.startswith("_")), key=name_key)
    body = "\n".join(from_lines(home, [(n, n) for n in names]))
    listed = "__all__ = [" + ", ".join(f'"{n}"' for n in names) + "]"
    if len(listed) > WIDTH:
        listed = "__all__ = [\n" + "".join(f'    "{n}",\n' for n in names) + "]"
    plan.tree.write(f"klfast/{name}.py", f'"""{docstring}"""\n\n{body}\n\n{listed}\n')


# ------------------------------------------------------------------------------------------------------------------- main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    for mode in ("names", "csrc", "tests", "check"):
        parser.add_argument(f"--{mode}", action="store_true")
    parser.add_argument("--without-names", action="store_true", help="move klfast/ although single names have not moved: to see the circles that makes")
    parser.add_argument("--table", type=Path, help="for --names: a Python file with NAMES, NEW_MODULES (and REFERENCES, REEXPORTS, NAME_FIXUPS) in place of those in tables.py")
    asked = parser.parse_args()
    if asked.table:
        given: dict = {}
        exec(compile(asked.table.read_text(), asked.table, "exec"), given)  # noqa: S102 (the user's own table)
        for name, empty in (("NAMES", {}), ("NEW_MODULES", {}), ("REFERENCES", {}), ("REEXPORTS", {}), ("NAME_FIXUPS", [])):
            setattr(tables, name, given.get(name, empty))
    root = asked.root.resolve()
    if asked.check:
        import check

        sys.exit(check.main(root))
    if asked.csrc:
        import move_csrc

        plan = move_csrc.move(root)
    elif asked.tests:
        import move_tests

        plan = move_tests.move(root)
    elif asked.names:
        plan = move_names(root)
    else:
        plan = move_package(root, asked.without_names)
    print(git(root, "diff", "--cached", "--stat", "-M30%").splitlines()[-1].strip())
    print(f"{len(plan.report)} things to look at:" if plan.report else "nothing left to look at")
    for line in plan.report:
        print(f"  {line}")


if __name__ == "__main__":
    sys.modules.setdefault("move", sys.modules["__main__"])
    main()
