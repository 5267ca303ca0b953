"""Kernels by device; klfast.ops registers them."""
