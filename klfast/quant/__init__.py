"""Quantization: formats, specs, quantized tensors and their layouts, rounding.

Each module imports only those before it: packing, layouts (plain tensors) -> grid -> formats -> spec -> tensor ->
rounding.
"""
