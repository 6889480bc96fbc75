"""Triton kernels, installed as ``fused_dni.kernels``.

They know tensors and nothing of modules, rules or autograd:
:mod:`fused_dni.backends.triton.backend` adapts them to the signature of all backends. A file is
read from the top: device functions, kernel, launcher (which plans
:class:`~fused_dni.kernels.launch.Launch` objects and runs nothing). Where ``TRITON_INTERPRET=1`` is
set before the first import they run on CPU tensors, one program after another.
"""
