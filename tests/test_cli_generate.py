"""klfast generate and what all commands share: printed commands, output that cannot be written, errors, completion."""

import shlex

from klfast.cli.console import command


def test_printed_commands_are_quoted():
    words = ["klfast", "eval", "my models/it's $HOME", "--teacher", "a;b"]
    assert shlex.split(command(*words)) == words
    assert command("klfast", "plan", "s.json", "--max-bytes", "SIZE") == "klfast plan s.json --max-bytes SIZE"
