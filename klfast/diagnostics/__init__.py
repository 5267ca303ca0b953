"""Which implementations run on this machine, why, and whether they are right: ``klfast.explain``, ``klfast.doctor``."""
