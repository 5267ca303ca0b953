"""That the move changed nothing but imports, names of modules and mentions: compares trees of two commits by the table of a mode.

    python3 same.py REPO OLD NEW MODE      MODE: package, csrc or tests
"""
import ast, re, subprocess, sys
import tables
repo, old, new, mode = sys.argv[1:]
def show(commit, path):
    return subprocess.run(["git", "-C", repo, "show", f"{commit}:{path}"], capture_output=True, text=True).stdout
files = subprocess.run(["git", "-C", repo, "ls-tree", "-r", "--name-only", old], capture_output=True, text=True).stdout.split("\n")
moves = {"package": tables.MOVES, "csrc": tables.CSRC, "tests": tables.TESTS}[mode]
def place(path):
    for a, b in (tables.TEST_FOLDERS.items() if mode == "tests" else ()):
        if path.startswith(a + "/"):
            return b + path[len(a):]
    return moves.get(path, path)
class Blank(ast.NodeTransformer):
    def visit_Import(self, node): return None
    visit_ImportFrom = visit_Import
    def visit_Name(self, node): return ast.Name("x", node.ctx)
    def visit_Constant(self, node): return ast.Constant("" if isinstance(node.value, str) else node.value)
    def visit_JoinedStr(self, node): return ast.Constant("")
    def visit_Attribute(self, node):
        self.generic_visit(node)
        return node
def python(text):
    return ast.dump(Blank().visit(ast.parse(text)))
def cpp(text):
    return [re.sub(r'"[^"]*/', '"', re.sub(r"//.*", "", line)).strip() for line in text.splitlines() if not line.lstrip().startswith("//") and "#include" not in line]
differ = 0
for path in files:
    if not path or path in tables.REMOVED: continue
    if path.endswith(".py"):
        a, b = show(old, path), show(new, place(path))
        if python(a) != python(b):
            differ += 1; print("differs:", path, "->", place(path))
    elif path.endswith((".cpp", ".h")) and path.startswith("csrc"):
        if cpp(show(old, path)) != cpp(show(new, place(path))):
            differ += 1; print("differs:", path)
print(differ, "files differ beyond imports, names and strings")
