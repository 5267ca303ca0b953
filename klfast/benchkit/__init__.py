"""Clock, runner, contenders and weights, shared by the bench suite and ``klfast doctor --device``."""
