"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import folders, runs
from .library import warn_if_incomplete
from .nodes.compare import QARVDCompare, QARVDInfo
from .nodes.core import QARVDDecode, QARVDToModel
from .nodes.load import QARVDLoadPipeline, QARVDLoadQuantized
from .nodes.quantize import QARVDCalibrationPrompts, QARVDQuantize, QARVDSaveQuantized
from .nodes.stream import QARVDStreamGenerate
from .nodes.text import QARVDEncodePrompt

NODES = [
    QARVDLoadPipeline,
    QARVDLoadQuantized,
    QARVDCalibrationPrompts,
    QARVDQuantize,
    QARVDSaveQuantized,
    QARVDEncodePrompt,
    QARVDStreamGenerate,
    QARVDDecode,
    QARVDToModel,
    QARVDCompare,
    QARVDInfo,
]


class QARVDExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        folders.register()  # here, since 0.3.75 does not call on_load
        warn_if_incomplete()
        runs.register()
        return NODES
