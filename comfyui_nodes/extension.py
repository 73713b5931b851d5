"""List the nodes for ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import folders, runs
from .library import warn_if_incomplete
from .nodes.compare import QARVDCompare, QARVDInfo
from .nodes.core import QARVDDecode, QARVDToModel
from .nodes.load import QARVDLoadPipeline, QARVDLoadQuantized
from .nodes.load_core import QARVDLoadDiffusionModel
from .nodes.lora import QARVDLora
from .nodes.measure import QARVDEvaluate, QARVDMixedPrecision, QARVDPlan, QARVDSensitivity
from .nodes.quantize import QARVDCalibrationPrompts, QARVDQuantize
from .nodes.save import QARVDSaveQuantized
from .nodes.states import QARVDLoadState, QARVDSaveState
from .nodes.stream import QARVDStreamGenerate
from .nodes.text import QARVDEncodePrompt, QARVDPromptSchedule

NODES = [
    QARVDLoadPipeline,
    QARVDLoadQuantized,
    QARVDCalibrationPrompts,
    QARVDQuantize,
    QARVDSaveQuantized,
    QARVDEncodePrompt,
    QARVDPromptSchedule,
    QARVDLora,
    QARVDStreamGenerate,
    QARVDDecode,
    QARVDToModel,
    QARVDCompare,
    QARVDInfo,
    QARVDSaveState,
    QARVDLoadState,
    QARVDEvaluate,
    QARVDSensitivity,
    QARVDMixedPrecision,
    QARVDPlan,
    QARVDLoadDiffusionModel,
]


class QARVDExtension(ComfyExtension):
    """Register folders and routes, and hand the nodes to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes, after one-time set-up."""
        folders.register()  # here, since 0.3.75 does not call on_load
        warn_if_incomplete()
        runs.register()
        return NODES
