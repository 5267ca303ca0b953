"""What the bench suite and ``klfast doctor --device`` share: clock, runner, contenders, weights."""
