"""What runs on this machine, why not the rest, and whether it is right: ``klfast.explain``, ``klfast.doctor``."""
