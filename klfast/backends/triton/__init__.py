"""Kernels on CUDA and XPU devices, in Triton but for linear."""
