"""GGUF, the file format of llama.cpp: written from a model, quantized or not."""
