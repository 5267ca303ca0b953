"""klfast's kernels inside transformers' own models: ``klfast.accelerate``."""
