"""The bench suite, run by ``klfast bench`` and ``make bench``; installed as klfast.bench in a wheel."""
