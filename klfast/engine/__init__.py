"""The native engine: models lowered to programs that the CPU extension runs without Python in between."""
