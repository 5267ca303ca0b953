"""The source of a version of transformers, parsed, not imported, so a wheel can be read without installing it."""

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

_FILE = re.compile(r"transformers/(models/(\w+)/(configuration|modeling)_\2|__init__)\.py")


class Source:
    """The configurations and modeling files of a version of transformers.

    Args:
        texts: {path, from "transformers/" on: text of the file}.
    """

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        found = re.search(r'^__version__ = "(.+)"', texts["transformers/__init__.py"], re.MULTILINE)
        assert found is not None
        self.version = found[1]

    @classmethod
    def of(cls, path: Path) -> "Source":
        """Read a folder that holds the package, or a wheel."""
        if path.is_dir():
            files = {file.relative_to(path).as_posix(): file for file in (path / "transformers").rglob("*.py")}
            return cls({name: file.read_text("utf-8") for name, file in files.items() if _FILE.fullmatch(name)})
        with zipfile.ZipFile(path) as wheel:
            return cls({name: wheel.read(name).decode() for name in wheel.namelist() if _FILE.fullmatch(name)})

    def of_model(self, model_type: str) -> tuple["Module", "Module"] | None:
        """Return the configuration and modeling files of a model type, None if there is no such type."""
        field = f'model_type = "{model_type}"'
        for name, text in self.texts.items():
            if "/configuration_" in name and f"    {field}\n" in text:
                return Module(text), Module(self.texts[name.replace("/configuration_", "/modeling_")])
        return None


class Module:
    """The classes and functions that a file defines at its top level."""

    def __init__(self, text: str) -> None:
        body = ast.parse(text).body
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        self.functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}

    def class_with(self, statement: str) -> str:
        """Return the name of the class whose body has this statement."""
        return next(name for name, node in self.classes.items() if statement in map(ast.unparse, node.body))

    def ancestry(self, name: str) -> Iterator[ast.ClassDef]:
        """Yield a class and those of this file that it inherits from, the nearest first."""
        if name in self.classes:
            yield self.classes[name]
            for base in self.classes[name].bases:
                yield from self.ancestry(name_of(base))

    def method(self, class_name: str, name: str) -> ast.FunctionDef | None:
        """Return a method, inherited ones included."""
        methods = (node for parent in self.ancestry(class_name) for node in parent.body)
        return next((node for node in methods if isinstance(node, ast.FunctionDef) and node.name == name), None)

    def attributes(self, class_name: str) -> dict[str, str]:
        """Return {attribute: the class that makes it, or ""} of all that a class's fields and methods define."""
        found: dict[str, str] = {}
        for parent in self.ancestry(class_name):
            found |= {name_of(node.target): "" for node in parent.body if isinstance(node, ast.AnnAssign)}
            for node in ast.walk(parent):
                for target in node.targets if isinstance(node, ast.Assign) else ():
                    if isinstance(target, ast.Attribute) and name_of(target.value) == "self":
                        found[target.attr] = found.get(target.attr) or _maker(node.value)
        return found


def name_of(node: ast.AST | None) -> str:
    """Return a name, or the last part of a dotted one; "" for other expressions."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _maker(value: ast.AST) -> str:
    """Return the name of the outermost call in an expression."""
    calls = [node for node in ast.walk(value) if isinstance(node, ast.Call)]
    return name_of(calls[0].func) if calls else ""


def inference_calls(function: ast.FunctionDef) -> list[ast.Call]:
    """Return the calls in a forward, without those for training alone."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        only_training = isinstance(node, ast.If) and re.search(r"(?<!not )self\.training", ast.unparse(node.test))
        for child in node.orelse if only_training else ast.iter_child_nodes(node):
            yield from walk(child)

    return [node for node in walk(function) if isinstance(node, ast.Call)]


def parameters(function: ast.FunctionDef) -> list[str]:
    """Return the names of a function's parameters, without self, ``*args`` and ``**kwargs``."""
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs) if argument.arg != "self"]
