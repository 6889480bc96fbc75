"""Profiles: a command under Nsight Systems, Nsight Compute or ``torch.profiler``, annotated.

What each tool shows is told in docs/profiling.md.
"""
