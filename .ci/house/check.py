"""Whether a tree is whole: every import, every attribute of a module, every dotted name in a string, every #include, old names left.

    python3 check.py ROOT      (or move.py ROOT --check)

By AST alone; nothing is imported. Then the imports between packages, and which of them close circles.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections import defaultdict
from pathlib import Path

import tables
from move import UNTOUCHED, Tree, defined_by, dotted_of

LAYERS = [  # from the bottom; what stands on one line may import one another
    ("core",), ("dispatch", "quant"), ("reference",), ("kernels",), ("backends",), ("ops",), ("nn",), ("models",), ("acceleration",), ("sensitivity",), ("planning",),
    ("checkpoint", "evaluation", "generation", "text"), ("reporting",), ("benchkit",), ("bench",), ("diagnostics",), ("demo",), ("cli",),
]


class Names:
    """What each module holds at its top level, by AST."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self._found = tree, {}
        self.modules = dict(tree.modules)
        for path in tree.files:  # helpers of tests, the folder bench/ from the repository's root
            if path.startswith("bench/") and path.endswith(".py"):
                self.modules["bench" if path == "bench/__init__.py" else "bench." + path[6:-3].replace("/", ".")] = path
        self.packages = {".".join(m.split(".")[:i]) for m in self.modules for i in range(1, m.count(".") + 2)}
        self.public = tree.public()

    def of(self, module: str) -> set[str]:
        if module not in self._found:
            self._found[module] = found = set()
            path = self.modules.get(module)
            if path:
                collect(self.tree.parsed(path).body, found)
                found |= {"__file__", "__name__", "__doc__", "__path__"}
            if module == "klfast":
                found |= {*self.public, "_C", "__version__"} | set(tables.ALIASES)
        return self._found[module]

    def has(self, module: str, name: str) -> bool:
        return name in self.of(module) or f"{module}.{name}" in self.packages or f"{module}.{name}" == "klfast._C"

    def attribute_module(self, module: str, name: str) -> str | None:
        """The module that ``module.name`` is, as a submodule or as one that it imports."""
        if module == "klfast" and name in self.public:
            return None
        if f"{module}.{name}" in self.packages:
            return f"{module}.{name}"
        path = self.modules.get(module)
        if path:
            for node in ast.walk(self.tree.parsed(path)):
                if isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        if (alias.asname or alias.name) == name and f"{base_of(node, module, path)}.{alias.name}" in self.packages:
                            return f"{base_of(node, module, path)}.{alias.name}"
        return None


def collect(body: list[ast.stmt], found: set[str]) -> None:
    for node in body:
        found |= defined_by(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try)):
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            for part in ("body", "orelse", "finalbody", "handlers"):
                for inner in getattr(node, part, ()):
                    collect(inner.body if isinstance(inner, ast.ExceptHandler) else [inner], found)


def base_of(node: ast.ImportFrom, module: str | None, path: str) -> str:
    if not node.level:
        return node.module or ""
    package = module if path.endswith("__init__.py") else (module or "").rpartition(".")[0]
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def check_names(path: str, tree: ast.Module, text: str, problems: list[str]) -> None:
    """Names that nothing in the file binds, and imports that nothing in it uses (and no noqa excuses)."""
    bound, loaded = set(), set()
    imports: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                imports[alias.asname or alias.name.split(".")[0]] = node.lineno
    for name in sorted(loaded - bound - imports.keys() - set(dir(builtins)) - {"__file__", "__name__", "__path__"}):
        problems.append(f"{path}: {name} is bound nowhere in the file")
    exported = next((set(ast.literal_eval(n.value)) for n in tree.body if "__all__" in defined_by(n) and isinstance(n.value, (ast.List, ast.Tuple))), set())
    lines = text.splitlines()
    in_text = set(re.findall(r"\w+", " ".join(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))))
    for name, line in imports.items():
        if name not in loaded and name not in exported and name != "annotations" and "noqa" not in lines[line - 1] and not (name in in_text and "Mapping[str, " in text):
            if not path.endswith("__init__.py"):
                problems.append(f"{path}:{line}: {name} is imported and not used")


def ours(dotted: str) -> bool:
    return dotted.split(".")[0] in ("klfast", "bench")


def check_python(names: Names, problems: list[str]) -> None:
    for path in names.tree.python:
        module = dotted_of(path)
        check_code(names, path, module, names.tree.parsed(path), problems)
        check_names(path, names.tree.parsed(path), names.tree.read(path), problems)
        text = names.tree.read(path)
        for node in ast.walk(names.tree.parsed(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\b(import|from)\s+klfast", node.value):
                try:
                    inner = ast.parse(node.value if not node.value.lstrip("\n").startswith(" ") else "if 1:\n" + node.value)
                except SyntaxError:
                    continue
                check_code(names, f"{path} (string at line {node.lineno})", None, inner, problems)
        for number, line in enumerate(text.splitlines(), 1):
            check_dotted(names, f"{path}:{number}", line, problems)


def check_code(names: Names, path: str, module: str | None, tree: ast.AST, problems: list[str]) -> None:
    local: dict[str, set[str]] = defaultdict(set)
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)} | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if ours(alias.name):
                    if alias.name not in names.packages and alias.name != "klfast._C":
                        problems.append(f"{path}:{node.lineno}: import {alias.name}: there is no such module")
                    local[alias.asname or alias.name.split(".")[0]].add(alias.name if alias.asname else alias.name.split(".")[0])
                else:
                    stored.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            if node.level and not module:
                continue
            base = base_of(node, module, path)
            if not ours(base):
                stored |= {alias.asname or alias.name for alias in node.names}
                continue
            if base not in names.packages:
                problems.append(f"{path}:{node.lineno}: from {base}: there is no such module")
                continue
            for alias in node.names:
                if not names.has(base, alias.name):
                    problems.append(f"{path}:{node.lineno}: from {base} import {alias.name}: it holds no such name")
                elif f"{base}.{alias.name}" in names.packages and not (base == "klfast" and alias.name in names.public):
                    local[alias.asname or alias.name].add(f"{base}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in stored:
            for owner in local.get(node.value.id, ()):
                if not names.has(owner, node.attr) and len(local[node.value.id]) == 1:
                    problems.append(f"{path}:{node.lineno}: {node.value.id}.{node.attr}: {owner} holds no such name")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and isinstance(node.value.value, ast.Name):
            owners = local.get(node.value.value.id, ())
            if len(owners) == 1 and node.value.value.id not in stored:
                (owner,) = owners
                inner = names.attribute_module(owner, node.value.attr)
                if inner and not names.has(inner, node.attr):
                    problems.append(f"{path}:{node.lineno}: {node.value.value.id}.{node.value.attr}.{node.attr}: {inner} holds no such name")
        elif isinstance(node, ast.Call) and len(node.args) >= 2 and isinstance(node.args[0], ast.Name) and isinstance(node.args[1], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("setattr", "delattr", "getattr") and isinstance(node.args[1].value, str):
                for owner in local.get(node.args[0].id, ()):
                    if node.args[0].id not in stored and not names.has(owner, node.args[1].value):
                        problems.append(f"{path}:{node.lineno}: {function}({node.args[0].id}, {node.args[1].value!r}): {owner} holds no such name")


def check_dotted(names: Names, where: str, line: str, problems: list[str]) -> None:
    """klfast.a.b anywhere in a line: each part must be a module, or a name of the module before it."""
    for match in re.finditer(r"(?<![\w.-])klfast((?:\.\w+)+)", line):
        module = "klfast"
        for part in match[1][1:].split("."):
            if module == "klfast" and (part in names.public or part in ("json", "cli")):
                break
            if f"{module}.{part}" in names.packages:
                module = f"{module}.{part}"
            elif names.attribute_module(module, part):
                module = names.attribute_module(module, part)
            else:
                if not names.has(module, part):
                    problems.append(f"{where}: {match[0]}: {module} holds no {part}")
                break


def check_other(names: Names, problems: list[str]) -> None:
    tree = names.tree
    files = set(tree.files)
    folders = {str(parent) for name in files for parent in Path(name).parents}
    for path in tree.text:
        for number, line in enumerate(tree.read(path).splitlines(), 1):
            if not path.endswith(".py"):
                check_dotted(names, f"{path}:{number}", line, problems)
            for match in re.finditer(r"(?<![\w/.{}$*-])(?:klfast|csrc|kernels|bench|tests|docs|examples|\.ci)(?:/[\w.-]+)+", line):
                name = match[0].rstrip("./")
                if name not in files and name not in folders and not re.search(r"[*{]", line[match.end() : match.end() + 1]):
                    if re.match(r"klfast/(kernels|bench|_C)", name) or "-" in name.split("/")[0]:
                        continue
                    problems.append(f"{path}:{number}: {name}: there is no such file")
    includes = {name for name in files if name.startswith("csrc/")}
    for path in includes:
        if path.endswith((".cpp", ".h")):
            for number, line in enumerate(tree.read(path).splitlines(), 1):
                if match := re.match(r'\s*#\s*include "([^"]+)"', line):
                    if f"csrc/{match[1]}" not in includes:
                        problems.append(f"{path}:{number}: #include {match[1]}: there is no such file")


def left_over(tree: Tree) -> list[str]:
    """Bare file names in prose and comments that no file has any more, and old names of modules in strings."""
    found = []
    present = {Path(name).name for name in tree.files}
    old = {Path(name).name for table in (tables.MOVES, getattr(tables, "CSRC", {}), getattr(tables, "TESTS", {})) for name in table} | {"device/", "planner/"}
    gone = sorted(name for name in old if name not in present and not name.endswith("/"))
    if not gone:
        return []
    stems = {Path(name).stem for name in present}
    words = sorted(stem for name in gone if "_" in (stem := Path(name).stem) and stem not in stems and not stem.startswith("test_") and name.endswith(".py"))
    by_word = re.compile(rf"(?<![\w])(?:{'|'.join(words)})(?!\w)") if words else None
    for path in tree.python:
        text = tree.read(path)
        if by_word and by_word.search(text):  # old names of modules in strings and comments; as a local name they are meant
            bound = {a.asname for n in ast.walk(tree.parsed(path)) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names if a.asname}
            for number, line in enumerate(text.splitlines(), 1):
                if (match := by_word.search(line)) and match[0] not in bound:
                    found.append(f"{path}:{number}: {match[0]}: {line.strip()[:140]}")
    pattern = re.compile(rf"(?<![\w/])(?:{'|'.join(map(re.escape, gone))})(?!\w)")
    for path in tree.text:
        if UNTOUCHED.match(path):
            continue
        for number, line in enumerate(tree.read(path).splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{path}:{number}: {match[0]}: {line.strip()[:140]}")
    return found


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def package_graph(names: Names) -> dict[tuple[str, str], list[str]]:
    """(package, package it imports) -> where, each with the line; lazy ones are marked."""
    edges = defaultdict(list)
    for path in names.tree.python:
        module = dotted_of(path)
        if not module or module == "klfast":
            continue
        tree = names.tree.parsed(path)
        lazy = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) for n in ast.walk(f)}
        for node in ast.walk(tree):
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names if alias.name.startswith("klfast.")]
            elif isinstance(node, ast.ImportFrom):
                base = base_of(node, module, path)
                if base == "klfast":
                    for alias in node.names:
                        if alias.name in names.public:
                            targets.append(f"klfast.{names.public[alias.name]}")
                        elif alias.name != "_C" and f"klfast.{alias.name}" in names.packages:
                            targets.append(f"klfast.{alias.name}")
                elif base.startswith("klfast."):
                    targets = [base]
            if targets:
                for target in dict.fromkeys(targets):
                    a, b = package_of(module), package_of(target)
                    if a != b and a not in ("__main__", "errors"):
                        mark = "lazy  " if id(node) in lazy else "      "
                        edges[a, b].append(f"{mark}{path}:{node.lineno}: {ast.unparse(node)[:150]}")
    return edges


def upward(edges: dict[tuple[str, str], list[str]]) -> list[tuple[str, str]]:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    return sorted((a, b) for a, b in edges if level.get(a, 99) < level.get(b, 99) or (level.get(a) == level.get(b) and a != b))


def circles(edges: dict[tuple[str, str], list[str]], top_level_only: bool) -> list[list[str]]:
    """Strongly connected components of more than one package."""
    graph = defaultdict(set)
    for (a, b), where in edges.items():
        if not top_level_only or any(not w.startswith("lazy") for w in where):
            graph[a].add(b)
    index, low, stack, on, out = {}, {}, [], set(), []

    def visit(v: str) -> None:
        index[v] = low[v] = len(index)
        stack.append(v)
        on.add(v)
        for w in graph[v]:
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in on:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            component = []
            while True:
                w = stack.pop()
                on.discard(w)
                component.append(w)
                if w == v:
                    break
            if len(component) > 1:
                out.append(sorted(component))

    for v in list(graph):
        if v not in index:
            visit(v)
    return out


def main(root: Path) -> int:
    names = Names(Tree(root))
    problems: list[str] = []
    check_python(names, problems)
    check_other(names, problems)
    problems = list(dict.fromkeys(problems))
    print(f"{len(problems)} problems")
    for line in problems:
        print(f"  {line}")
    left = left_over(names.tree)
    print(f"{len(left)} mentions of file names that are gone")
    for line in left:
        print(f"  {line}")
    if (root / "klfast/core").is_dir():
        edges = package_graph(names)
        for top_level_only in (True, False):
            found = circles(edges, top_level_only)
            print(f"circles between packages, {'top-level imports alone' if top_level_only else 'lazy imports too'}: {found or 'none'}")
        print("imports against the layers:")
        for pair in upward(edges):
            print(f"  {pair[0]} -> {pair[1]}")
            for where in edges[pair]:
                print(f"    {where}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
