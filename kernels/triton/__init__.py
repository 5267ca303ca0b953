"""Triton kernels for CUDA and XPU devices, imported on first use only.

An op has a file with its kernels and one function that plans what to launch (``launch.Launch``): which kernels, with which
arguments and configuration, for tensors of these shapes and dtypes. Planning needs no driver and touches no tensor's
values, so that the tests compile exactly what would run, for GPUs that are not there.

Rules for all: what may be many (tokens, sequences times heads) lies along the first axis of the grid, since CUDA's others end at
65,535 programs; plain pointers; offsets of rows in 64 bits; no float64, no inline assembly. Kernels with products
have no masks over the reduced dimension (what overhangs there is filled up beforehand; rows that overhang read the last row
again, and only stores are masked).
"""
