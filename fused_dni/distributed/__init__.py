"""Pipelines over processes and hosts in which no stage waits for a backward."""

from fused_dni.distributed.checkpoint import Checkpoints
from fused_dni.distributed.pipeline import Pipeline, StepOutput
from fused_dni.distributed.pipelining import DecoupledPipelineStage
from fused_dni.distributed.stage import MODES, Stage
from fused_dni.distributed.twin import Twin
from fused_dni.distributed.wire import PipelineError

__all__ = [
    "MODES",
    "Checkpoints",
    "DecoupledPipelineStage",
    "Pipeline",
    "PipelineError",
    "Stage",
    "StepOutput",
    "Twin",
]
