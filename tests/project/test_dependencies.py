"""Whatever klfast imports is a dependency of its own, or certain to come with one."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMES_WITH = {"huggingface_hub": "transformers", "starlette": "fastapi", "typing_extensions": "torch"}


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs pyproject.toml")
def test_every_import_is_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = sum(project["optional-dependencies"].values(), project["dependencies"])
    declared = {re.match(r"[\w-]+", one)[0].replace("-", "_") for one in stated}
    files = [*(ROOT / "klfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    imported = {name.partition(".")[0] for path in files for name in imports(ast.parse(path.read_text()))}
    assert {COMES_WITH.get(name, name) for name in imported - sys.stdlib_module_names} <= declared


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
