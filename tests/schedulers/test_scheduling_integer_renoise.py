"""The sampler with integer timesteps: its table, and the two noise levels that one timestep stands for."""

from __future__ import annotations

import pytest
import torch

from qarvd_diffusers.schedulers import IntegerRenoiseScheduler

# Numbers that LingBot-World's public code computes for its two lists of steps, at shift 10.
TABLES = {
    (1000, 821, 642, 321): (
        [999, 978, 947, 825],
        [0.9998999238014221, 0.978971004486084, 0.947908878326416, 0.8258525729179382],
        [0.9997997283935547, 0.978829562664032, 0.9476930499076843, 0.8251925706863403],
    ),
    (1000, 750, 500, 250): (
        [999, 967, 908, 768],
        [0.9998999238014221, 0.967949390411377, 0.908925473690033, 0.7689939141273499],
        [0.9997997283935547, 0.9677833914756775, 0.9085941314697266, 0.7680441737174988],
    ),
}


@pytest.mark.parametrize("steps", TABLES)
def test_levels_of_predictions_and_of_noise(steps):
    timesteps, predicted, renoised = TABLES[steps]
    scheduler = IntegerRenoiseScheduler(steps)
    assert scheduler.timesteps.tolist() == timesteps
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for timestep, first, second in zip(timesteps, predicted, renoised, strict=True):
        assert -scheduler.predict_original(one.double(), timestep, zero).item() == pytest.approx(first, abs=1e-9)
        assert scheduler.add_noise(zero, one, timestep).item() == pytest.approx(second, abs=1e-9)


def test_a_step_uses_both_levels():
    scheduler = IntegerRenoiseScheduler()
    sample, flow, noise = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unsqueeze(1).unbind()
    moved, clean = scheduler.step(flow, 999, sample, noise=noise, return_dict=False)
    _, predicted, renoised = TABLES[1000, 750, 500, 250]
    torch.testing.assert_close(clean, sample - predicted[0] * flow)
    torch.testing.assert_close(moved, (1 - renoised[1]) * clean + renoised[1] * noise)
    last, clean = scheduler.step(flow, 768, sample, return_dict=False)
    assert torch.equal(last, clean)


def test_config_round_trip(tmp_path):
    scheduler = IntegerRenoiseScheduler((1000, 500), timestep_shift=5.0)
    scheduler.save_pretrained(tmp_path)
    assert IntegerRenoiseScheduler.from_pretrained(tmp_path).timesteps.tolist() == scheduler.timesteps.tolist()
