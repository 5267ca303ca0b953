"""What commands print: texts as they are."""

import pytest

from klfast.cli.console import emit, table
from klfast.reporting.table import Table

NAMES = ["q[/a]", "q :100: [red]x"]


@pytest.mark.parametrize("name", NAMES)
def test_brackets_and_colons_are_no_markup(capsys, name):
    for made in (table([name, ""], [(name, "1")], name), Table(name, (name, "value"), ((name, 1),)).rich()):
        emit({}, made, as_json=False)
        assert capsys.readouterr().out.count(name) == 3
    emit({}, ["a", f"finding: {name}"], as_json=False)
    assert capsys.readouterr().out == f"a\nfinding: {name}\n"
