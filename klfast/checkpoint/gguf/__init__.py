"""GGUF, the file format of llama.cpp: models of such files in klfast's formats."""
