"""Parts of models: linear layers, heads, chains of blocks, and the records of model families."""
