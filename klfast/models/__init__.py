"""What model families look like: linear layers, chains of blocks, native SSM functions."""
