"""klfast's exports, and the packages in the wheel."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import klfast

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", klfast.__all__)
def test_public_names(name):
    assert getattr(klfast, name).__name__ == name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["errors", "data", "loading"])
def test_earlier_names_of_modules(name):
    module = importlib.import_module(f"klfast.{name}")
    assert all(getattr(module, public) is getattr(klfast, public) for public in module.__all__)
    code = f"import klfast; print(klfast.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"klfast.{name}"


def test_pyproject_lists_every_package():
    """Except klfast.kernels and klfast.bench, which lie in kernels/triton and bench."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "klfast").rglob("__init__.py")}
    assert set(project["packages"]) == found | {"klfast.bench", "klfast.kernels"}
    assert project["package-dir"] == {"klfast": "klfast", "klfast.bench": "bench", "klfast.kernels": "kernels/triton"}


def test_no_module_has_the_name_of_something_public():
    """Its import would put it in that one's place."""
    assert not {module.name for module in pkgutil.iter_modules(klfast.__path__)} & {*klfast.__all__}


def test_type_checkers_see_the_public_names():
    """They read the imports under TYPE_CHECKING; at run time each name is imported when it is first asked for."""
    tree = ast.parse(Path(klfast.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == klfast.__all__
    assert all(getattr(importlib.import_module(module), name) is getattr(klfast, name) for name, module in seen.items())
