"""The value of a sensitivity measurement: weights, decay, file; and the switch behind it."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_wan import make_wan

from qarvd_diffusers.calibration.calibrate import quantize_weights
from qarvd_diffusers.calibration.sensitivity import SensitivityResult
from qarvd_diffusers.calibration.switch import QuantizationSwitch
from qarvd_diffusers.calibration.targets import prompt_linears, quantizable_linears
from qarvd_diffusers.config import PUBLISHED_SENSITIVITY, QARVDConfig
from qarvd_diffusers.quantization.install import quantized_layers
from qarvd_diffusers.quantization.linear import QARVDLinear

MEASURED = {"model": "abc", "config": {"scheme": "w4a8"}, "num_chunks": 3, "seed": 0}


def result(*matrices, num_prompts=None, frames=(3, 3, 3)):
    state = SensitivityResult(MEASURED, num_prompts or len(matrices), frames)
    for matrix in matrices:
        state = state.with_prompt(matrix)
    return state


def diagonal(*values):
    return [[v if k == c else 0.0 for c in range(len(values))] for k, v in enumerate(values)]


def test_sensitivity_is_the_mean_over_all_frames_and_prompts():
    state = result([[4.0, 2.0], [0.0, 1.0]], [[8.0, 0.0], [0.0, 3.0]], frames=(1, 3))
    assert state.sensitivity == (((4 + 3 * 2) / 4 + 8 / 4) / 2, (3 * 1 / 4 + 3 * 3 / 4) / 2)
    weights = state.chunk_weights
    assert math.isclose(sum(weights), 2) and math.isclose(weights[0] / weights[1], 2.25 / 1.5)
    assert QARVDConfig(chunk_weights=weights).sensitivity(2) == pytest.approx(weights)


def test_decay_of_a_true_exponential_and_of_the_published_numbers():
    decay = result(diagonal(*(0.5 * math.exp(-0.7 * k) for k in range(5))), frames=(3,) * 5).decay
    # the mean over five chunks: every sensitivity is a fifth of its diagonal entry
    assert (decay.amplitude, decay.rate, decay.r_squared) == pytest.approx((0.1, 0.7, 1.0))
    published = result(diagonal(*PUBLISHED_SENSITIVITY), frames=(3,) * 7).decay
    chunks, logs = np.arange(7), np.log(np.array(PUBLISHED_SENSITIVITY) / 7)
    slope, intercept = np.polyfit(chunks, logs, 1)
    assert (published.rate, published.amplitude) == pytest.approx((-slope, np.exp(intercept)))
    assert published.r_squared == pytest.approx(np.corrcoef(chunks, logs)[0, 1] ** 2)
    assert result(diagonal(1.0, 0.5), frames=(3, 3)).decay is None


def test_chunks_that_lose_nothing_have_no_weight():
    with pytest.raises(ValueError, match=r"chunks \[1\] alone changed nothing"):
        result(diagonal(1.0, 0.0, 0.5)).chunk_weights  # noqa: B018
    assert result(diagonal(1.0, 0.0, 0.5)).to_dict()["chunk_weights"] is None


def test_file_round_trip(tmp_path):
    state = result(diagonal(1.0, 1 / 3, 0.1), num_prompts=2)
    path = state.save(tmp_path / "new" / "x.json")
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    with pytest.raises(ValueError, match=r"x.json holds 1 of 2 prompts: run the measurement again"):
        SensitivityResult.load(path)
    partial = SensitivityResult.load(path, partial=True)
    assert partial.errors == state.errors and not partial.complete
    done = partial.with_prompt(diagonal(2.0, 1.0, 0.5))
    assert SensitivityResult.load(done.save(path)) == done
    stored = json.loads(path.read_text())
    assert tuple(stored["chunk_weights"]) == done.chunk_weights and stored["complete"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: text.replace("qarvd-sensitivity-1", "other"),
        lambda text: text.replace('"frames"', '"other"'),
        lambda text: json.dumps(json.loads(text) | {"errors": [[[1.0]]]}),
        lambda text: "[]",
    ],
)
def test_damaged_files_are_refused(tmp_path, damage):
    path = result(diagonal(1.0, 0.5, 0.1)).save(tmp_path / "x.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"x.json is not a sensitivity file \(.*delete it and measure again"):
        SensitivityResult.load(path)
    with pytest.raises(FileNotFoundError, match=r"absent.json: no such sensitivity file"):
        SensitivityResult.load(tmp_path / "absent.json")


def test_another_measurement_is_refused_by_name():
    state = result(diagonal(1.0, 0.5, 0.1))
    state.require_same_measurement(json.loads(json.dumps(MEASURED)), "x.json")
    other = MEASURED | {"config": {"scheme": "w8a8"}, "model": "def"}
    with pytest.raises(
        ValueError, match=r'x.json holds another measurement \(config: stored .*w4a8.*model: stored "abc"'
    ):
        state.require_same_measurement(other, "x.json")


def test_prompt_linears():
    wan = make_wan()
    found = prompt_linears(wan, quantizable_linears(wan, QARVDConfig()))
    want = {f"blocks.{b}.attn2.to_{c}" for b in (0, 1) for c in "kv"}
    assert found == want | {f"condition_embedder.text_embedder.linear_{i}" for i in (1, 2)}


def test_switch_leaves_nothing_behind():
    wan = make_wan()
    before = dict(wan.named_modules())
    layers = quantized_layers(wan, quantize_weights(wan, QARVDConfig("w8a8_dynamic", outlier_alignment=4)))
    x = torch.randn(1, 4, 3, 4, 4), torch.tensor([500.0]), torch.randn(1, 6, 24)
    with torch.no_grad():
        want = wan(*x).sample
        with pytest.raises(RuntimeError, match="stop"), QuantizationSwitch(wan, layers) as switch:
            assert torch.equal(wan(*x).sample, want)
            switch.set(True)
            assert sum(isinstance(module, QARVDLinear) for module in wan.modules()) == 22
            assert not torch.equal(wan(*x).sample, want)
            switch.set(False)
            assert torch.equal(wan(*x).sample, want)
            switch.set(True)
            raise RuntimeError("stop")
    after = dict(wan.named_modules())
    assert list(before) == list(after) and all(after[name] is module for name, module in before.items())
