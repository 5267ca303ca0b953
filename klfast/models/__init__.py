"""What models are made of: linear layers, heads, chains of blocks, and the records of model families."""
