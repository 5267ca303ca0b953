"""Hooks of mkdocs: which files of the repository are pages; the references of commands and of the Python interface."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import klfast
from klfast.cli import app

ROOT = Path(__file__).parents[2]
SOURCES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/*.ipynb",
    "docs/*.png",
    "docs/images/*.svg",
    "bench/results/**/*.md",
    "bench/results/**/*.png",
)
# Titles of the Python reference, by the package that a public name comes from; others bear their package's name.
TITLES = {
    "checkpoint": "Loading, quantizing, saving",
    "text": "Loading, quantizing, saving",
    "sensitivity": "Sweeping and planning",
    "rounding": "Sweeping and planning",
    "planning": "Sweeping and planning",
    "measured_kl": "Sweeping and planning",
    "measured_front": "Sweeping and planning",
    "benchkit": "Sweeping and planning",
    "evaluation": "Judging",
    "generation": "Generating",
    "export": "Other engines",
    "integrations": "Other engines",
    "acceleration": "Other engines",
    "quant": "Weights and layers",
    "nn": "Weights and layers",
    "ops": "Operations",
    "dispatch": "The machine",
    "diagnostics": "The machine",
    "core": "Errors and warnings",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's pages and pictures at their own paths, so that their links to each other hold."""
    found = sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)})
    for path in found:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "docs/COMMANDS.md", content=commands()))
    files.append(File.generated(config, "docs/API.md", content=interface()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Name links by the titles of their pages; show flowcharts as tables, since a browser would need a script."""
    named = re.sub(r"\[(?:docs/)?(\w+)\.md\](?=\()", lambda found: f"[{_title(found[1])}]", markdown)
    return re.sub(r"```mermaid\n(.*?)```", lambda found: _table(found[1]), named, flags=re.DOTALL)


@functools.cache
def _title(name: str) -> str:
    """Return the first heading of a page in docs; of others the file's name."""
    page = ROOT / "docs" / f"{name}.md"
    return page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") if page.is_file() else f"{name}.md"


def _table(flowchart: str) -> str:
    targets: dict[str, list[str]] = {}
    for source, target in re.findall(r"^ *(\w+) --> (.+)$", flowchart, re.MULTILINE):
        targets.setdefault(source, []).append(target.partition("[")[2].rstrip("]") or target)
    rows = [f"| `{source}` | {'; '.join(found)} |" for source, found in targets.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def interface() -> str:
    """Return the page of the Python interface, whose entries mkdocstrings fills from docstrings."""
    groups: dict[str, list[str]] = {title: [] for title in dict.fromkeys(TITLES.values())}
    for name, module in klfast._PUBLIC.items():
        groups.setdefault(TITLES.get(module.split(".")[0], module.split(".")[0]), []).append(name)
    lines = ["# Python interface", "", "All of these are names of the package `klfast`."]
    for title, names in groups.items():
        lines += ["", f"## {title}"]
        for name in names:
            inside = f"{name}.{name}" if klfast._PUBLIC[name] == name else name  # not the module of that name
            lines += ["", f"::: klfast.{inside}"]
    return "\n".join(lines)


def commands() -> str:
    """Return the page of the commands, from what their own --help says."""
    group: Any = typer.main.get_command(app)
    lines = ["# Commands", "", _prose(group.help), ""]
    context = typer.Context(group, info_name="klfast")
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        lines += [f"## klfast {name}", "", _prose(command.help), ""]
        own = typer.Context(command, info_name=f"klfast {name}", parent=context)
        lines += ["| argument or option | what it does | default |", "|---|---|---|", *_rows(command, own), ""]
    return "\n".join(lines)


def _rows(command: Any, context: Any) -> Iterator[str]:
    """Yield a table's row for each argument and option."""
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None:
            continue
        names, said = record
        if parameter.param_type_name == "argument":
            names = names.partition(" <")[0]  # without its type
        said, default = re.sub(r"\s*\[(default: [^\]]*|required)\]", "", said or ""), parameter.default
        shown = "" if default in (None, False, ()) or callable(default) else f"`{_default(default)}`"
        yield f"| `{names}` | {_prose(said)} | {shown} |"


def _default(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _prose(text: str) -> str:
    """Return help as Markdown: no line is indented, bars and wildcards are no markup."""
    lines = (line.strip() for line in (text or "").splitlines())
    return re.sub(r"([|*<])", r"\\\1", "\n".join(lines))
