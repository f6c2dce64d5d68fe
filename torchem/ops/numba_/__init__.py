"""Kernels compiled by numba for the CPU, for those who installed the extra ``fast``; imported where they are used."""
