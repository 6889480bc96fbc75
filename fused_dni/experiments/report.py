"""Where the report of a training run was written before :mod:`fused_dni.report.folder`."""

from fused_dni.report.folder import write_blocks as write_folder

__all__ = ["write_folder"]
