"""Triton kernels for CUDA and XPU devices, one op a file; imported on first use only."""
