"""Chunks of 2, 5 and 6 passes: counted by chunk and role, and weighted in calibration by chunk sensitivity."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from qarvd_diffusers.calibration.capture import InputCapture, pass_weight
from qarvd_diffusers.calibration.targets import quantizable_linears
from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.conversion.families import FAMILIES, available
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline

CHUNKS = 5
EXPECTED = {  # denoising passes and others, of chunks 0, 1 and the last
    "causal-forcing-framewise-1step": [(4, 1), (1, 1), (1, 1)],
    "causal-forcing-framewise-2step": [(4, 1), (2, 1), (2, 1)],
    "causvid": [(3, 1), (3, 1), (3, 1)],
    "krea": [(5, 0), (5, 1), (5, 1)],
}


@pytest.mark.parametrize("family", available())
def test_counts(tiny_pipeline, family):
    fields = FAMILIES[family].fields
    components = {**tiny_pipeline.components, "scheduler": None}
    pipe = ARVDPipeline(**components, height=32, width=48, **fields.to_dict())
    pipe.set_progress_bar_config(disable=True)
    config = QARVDConfig("w8a8", calibration_chunks=CHUNKS)
    linears = quantizable_linears(pipe.transformer, config)
    weigh, infos, weights = pass_weight(config), [], torch.zeros(CHUNKS, dtype=torch.float64)
    first = next(iter(linears))

    def observe(group, x, info):
        weights[info.chunk] += weigh(info)

    with InputCapture({first: linears[first]}, [(first,)], observe) as capture:
        stream = pipe.stream(
            "a red circle",
            num_chunks=CHUNKS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            on_pass=lambda info: (infos.append(info), capture.on_pass(info)),
        )
        for _ in stream:
            pass
    capture.check(range(CHUNKS))
    counts = Counter((info.chunk, info.role) for info in infos)
    assert capture.calls(first) == counts
    for chunk in range(CHUNKS):
        assert {role: n for role, n in fields.passes(chunk).items() if n} == {
            role: n for (c, role), n in counts.items() if c == chunk
        }
    found = [
        (counts[c, "denoise"], sum(counts[c, role] for role in ("refresh", "rebuild"))) for c in (0, 1, CHUNKS - 1)
    ]
    assert found == EXPECTED.get(family, [(4, 1)] * 3)
    sensitivity = torch.tensor(config.sensitivity(CHUNKS), dtype=torch.float64)
    torch.testing.assert_close(weights / weights.sum(), sensitivity / sensitivity.sum())
