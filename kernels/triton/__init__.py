"""Triton kernels for CUDA and XPU devices, imported on first use only.

Each op has a file with its kernels and a function that plans the launches (``launch.Launch``): the kernels with their
arguments and configuration, for given shapes and dtypes. Planning needs no driver and does not read tensors' values, so
that the tests compile exactly what would run, for GPUs that are absent.

Common rules: large counts (tokens, sequences times heads) go along the grid's first axis, since CUDA's others end at
65,535 programs; plain pointers; row offsets in 64 bits; no float64, no inline assembly. Kernels with products have no
masks over the reduced dimension (it is padded beforehand; rows beyond the end reread the last row, and only stores are
masked).
"""
