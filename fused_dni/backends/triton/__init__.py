"""Triton kernels (``kernels/``) as a backend."""
