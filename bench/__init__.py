"""The bench suite, run by ``klfast bench`` and ``make bench``; in a wheel it is installed as klfast.bench."""
