"""CUDA C++ kernels (``csrc/cuda``) as a backend."""
