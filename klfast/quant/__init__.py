"""Quantization formats: specs, quantized tensors, their layouts, and rounding to them."""
