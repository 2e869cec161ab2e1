"""Kernels in TIR: for CPUs scheduled by hand, for the rest left to tvm's default schedules."""
