"""README and docs: code blocks run, commands have the options named, pictures show the results, the notebook runs."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_folder
import typer
from code_blocks import PAGES, ROOT, blocks, klfast_commands, lines
from command_line import TEXT, klf

import klfast
from klfast.cli import app

LESS = {"--windows": "2", "--length": "32", "--tries": "1"}  # than the pages say
GROUP = typer.main.get_command(app)


def ids(page):
    return page.name


def options_of(name):
    """Return the options of a command, of klfast itself for ""."""
    command = GROUP.commands[name] if name else GROUP
    context = typer.Context(command, info_name=name)
    return {one for parameter in command.get_params(context) for one in (*parameter.opts, *parameter.secondary_opts)}


def pages_with(condition):
    return [page for page in PAGES if any(condition(block) for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_and_options_exist(page):
    for words in klfast_commands(page):
        name = "" if words[0].startswith("-") else words[0]
        assert not name or name in GROUP.commands, words
        used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= options_of(name), words
    for module in re.findall(r"python -m klfast\.bench\.(\w+)", page.read_text(encoding="utf-8")):
        assert (ROOT / "bench" / f"{module}.py").is_file(), module


def test_the_site_lists_every_page():
    listed = re.findall(r"[\w/]+\.md", (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    missing = {page.relative_to(ROOT).as_posix() for page in PAGES} - set(listed)
    assert not missing, f"docs/site/mkdocs.yml does not list {missing}"


@pytest.mark.parametrize("page", pages_with(lambda block: block.language == "python"), ids=ids)
def test_python_is_valid(page):
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.code)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(lambda block: block.reason is None), ids=ids)
def test_blocks_run(page, tmp_path, monkeypatch):
    """One after another in a folder with a model MODEL and two texts; Python goes on with the names before."""
    monkeypatch.chdir(tmp_path)
    tiny_folder.save_model(Path("MODEL"))
    for name in ("my.txt", "held-out.txt"):
        Path(name).write_text(TEXT)
    names = {"klfast": klfast, "model": klfast.load_model("MODEL"), "tokenizer": klfast.load_tokenizer("MODEL")}
    make = klfast.token_batches
    names["text"] = make("my.txt", names["tokenizer"], vocab_size=257, length=32, windows=2)
    monkeypatch.setattr(
        klfast, "token_batches", lambda *given, **more: make(*given, **(more | {"length": 32, "windows": 2}))
    )
    for block in blocks(page):
        if block.reason is None and block.language == "python":
            exec(compile(block.code, page.name, "exec"), names)
        elif block.reason is None:
            assert block.language == "", f"{page.name} has a block in {block.language}, which this test cannot run"
            for words in lines(block.code):
                run(words)


def run(words):
    """Run a command, klfast's in this process and on less text."""
    if words[0] == "klfast":
        reads_text = {"quantize": "gptq" in words, "plan": "--refine" in words}.get(words[1], True)
        has = options_of(words[1]) if reads_text else set()
        klf(*words[1:], *(word for option, value in LESS.items() if option in has for word in (option, value)))
    else:
        subprocess.run(words, check=True)


@pytest.mark.slow
def test_pictures_show_the_committed_results():
    spec = importlib.util.spec_from_file_location("charts", ROOT / "docs" / "charts.py")
    charts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(charts)
    for name, drawn in charts.drawings().items():
        assert (charts.IMAGES / name).read_text(encoding="utf-8") == f"{drawn}\n", f"{name}: run docs/charts.py"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install 'klfast[test]'")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the notebook's outputs"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    [said] = [out.text for cell in notebook.cells[-3:-2] for out in cell.outputs if out.get("name") == "stdout"]
    assert "KL 0.0" in said
