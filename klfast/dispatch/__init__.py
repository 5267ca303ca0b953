"""Which implementation of an op runs: definitions and kernels by device, pins, checks of every call."""
