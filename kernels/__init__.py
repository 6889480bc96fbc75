"""Triton kernels, installed as ``fused_dni.kernels``.

None is here yet: :mod:`fused_dni.backends` says so when the ``triton`` backend is asked for.
"""
