"""Quantize the transformer of any pipeline by watching the pipeline generate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.calibrate import Progress, calibrate
from ..calibration.processes import Processes
from ..calibration.report import Report, make_report, with_chunk_weights
from ..calibration.scout import scout
from ..calibration.watch import ReadPass, Watch, by_timestep
from ..config import QARVDConfig
from ..quantization.adapters import adapter_scales
from ..quantization.model import unwrapped
from ..quantizer import install

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

logger = logging.getLogger(__name__)

Rollout = Callable[[], Any]


@torch.no_grad()
def quantize(
    transformer: ModelMixin,
    rollouts: Iterable[Rollout],
    config: QARVDConfig = QARVDConfig(),  # noqa: B008 - it is frozen
    pass_info: ReadPass = by_timestep,
    progress: Progress | None = None,
) -> Report:
    """Calibrate a float transformer on rollouts of its own pipeline, which stays as it is, and quantize it in place.

    A first float rollout finds which layers run, which read the same tensor, and which read no tokens. What lies in
    repeated blocks is quantized, the rest stays float; `modules_to_convert` and `modules_to_not_convert` of the config
    overrule that. Under `accelerate launch` all processes call this, with the same rollouts, and share the work.

    Args:
        transformer: float model of diffusers.
        rollouts: functions without arguments; each generates once, by the pipeline of the transformer, and does the
            same whenever it is called (give it a seeded generator). They run two to four times, and for rounding once
            more for every few blocks.
        config: what to quantize to. `calibration_chunks` is that of the longest rollout.
        pass_info: tells the chunk of a pass from the pass before it and the arguments of the call. A pipeline that
            hands over a `section`:

                def by_section(last, arguments):
                    return PassInfo(arguments["section"], timestep=float(arguments["timestep"].max()))

            A pass that spans several chunks gives one for each of its frames in `PassInfo.chunks`.
        progress: see `calibrate`.

    Returns:
        What was quantized, what stayed float and why.

    Raises:
        ValueError: there is no rollout, one never calls the transformer, a pass does not tell its chunk, the model has
            no repeated blocks or is quantized already, or an activation is not finite. The transformer is then as it
            was, as after any error in a rollout.
    """
    model = unwrapped(transformer)
    watch = Watch(model, tuple(rollouts), pass_info)
    processes = Processes.launched()
    targets, config = scout(model, config, partial(watch.run, rollouts=watch.rollouts[:1]))
    processes.require_same([targets.groups, watch.chunks], "what the first rollout does")
    config, why = with_chunk_weights(model, config.replace(calibration_chunks=watch.chunks))
    share = processes.share(watch.rollouts)
    run_share = partial(watch.run, rollouts=share)
    result = calibrate(model, watch.run, config, progress, None, processes, run_share, targets)
    report = make_report(model, targets, result, config, why)
    adapters = adapter_scales(model) if config.needs_calibration else {}
    install(model, result, config.replace(calibration_adapters=adapters or None))
    logger.info("%s", report)
    return report
