"""The command line, run in this process."""

import re

from typer.testing import CliRunner

from klfast.cli import app

TEXT = "A small text, said over and over, is enough to see how the commands hang together. " * 12
FEW = ["--windows", "4", "--length", "64"]


def klf(*arguments, code=0):
    """Run a command and check its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def fails(*arguments, code=1):
    """Run a command that fails and return its one line on standard error."""
    result = klf(*arguments, code=code)
    lines = result.stderr.strip().splitlines()
    if code == 1:
        assert len(lines) == 1 and lines[0].startswith("klfast: "), result.stderr
        assert result.stdout == ""
    return " ".join(line.strip(" │╭╰─╮╯") for line in lines)


def silent(shown):
    """Return whether standard error has nothing but the line about the speed."""
    return re.fullmatch(r"(klfast: [^\n]* prompt tokens [^\n]* new tokens[^\n]*\n)?", shown) is not None
