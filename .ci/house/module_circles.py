"""Circles between single modules, lazy imports too.   python3 module_circles.py ROOT"""
import ast, sys
from collections import defaultdict
from pathlib import Path
from check import Names, base_of, circles
from move import Tree, dotted_of
names = Names(Tree(Path(sys.argv[1]).resolve()))
edges = defaultdict(list)
for path in names.tree.python:
    m = dotted_of(path)
    if not m or m == "klfast": continue
    tree = names.tree.parsed(path)
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = base_of(node, m, path)
            if not base.startswith("klfast"): continue
            for a in node.names:
                t = f"{base}.{a.name}" if f"{base}.{a.name}" in names.modules else base
                if t != m and t != "klfast": edges[m, t].append(("lazy" if id(node) in lazy else "top ") + f" {path}:{node.lineno}: {ast.unparse(node)[:110]}")
for found in circles(edges, False):
    print(found)
    for (a, b), w in sorted(edges.items()):
        if a in found and b in found: print("   ", *w, sep="\n    ")
