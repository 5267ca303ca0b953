"""``python -m klfast``: the command line."""

from klfast.cli import main

main()
