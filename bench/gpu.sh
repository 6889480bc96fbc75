#!/bin/bash
# bench/gpu.sh [first|second] OUT [SECONDS]: all that needs a GPU, in two calls that fit into fifteen
# minutes together (240 and 480 seconds), without a network. Each is useful if the other never
# happens; without a name both are made. docs/measuring.md says what they do and what OUT holds.
#
# For a bare machine with an NVIDIA GPU, Python 3.10 or newer, torch and Triton (tried for: torch
# 2.11 with Triton 3.6, and newer), setuptools, pybind11 and ninja; nvcc, ncu, compute-sanitizer and
# pytest are used if they are there. Nothing is installed; extensions are built into the work tree.
#
# PYTHON=...       interpreter, python3 by default
# ONLY="a b ..."   these parts alone, by their names in bench/gpu_run.py
# PREBUILT=DIR     extensions that were built for that interpreter elsewhere
# FUSED_DNI_CUDA_ARCHS=...   what nvcc compiles for, this GPU by default
# FUSED_DNI_COMMIT=...       what the results are of where there is no .git (or a file COMMIT)
# Exit status: 0 all parts done, 1 not all, 2 wrong use, 3 no GPU.

exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_run.py" "$@"
