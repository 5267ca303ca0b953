"""Kernels on the CPU: the C++ extension klfast._C and what it is told of tensors."""
