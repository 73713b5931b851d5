"""Other bits for some layers, and the choice of which."""

import json

import pytest
import torch

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.calibration.mixed_precision import layer_errors, most_costly
from qarvd_diffusers.quantization.result import CalibrationResult

PROMPTS = ("a red circle", "a blue square")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))


def config(scheme="w4a8", **options):
    return QARVDConfig(
        scheme, **{"calibration_prompts": PROMPTS, "calibration_chunks": 2, "outlier_alignment": 4, **options}
    )


def video(pipe):
    generator = torch.Generator().manual_seed(1)
    return pipe("a red circle", num_chunks=2, generator=generator, output_type="latent").frames


def test_the_longest_fitting_name_counts():
    mixed = config(module_bits={"blocks.1.ffn.net.2": 8, "blocks.1": 4, "ffn": 8})
    names = ("blocks.0.ffn.net.0.proj", "blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2", "blocks.0.attn1.to_q")
    assert [mixed.scheme_of(name).weight_bits for name in names] == [8, 4, 8, 4]
    assert mixed.scheme_of(names[0]).symmetric_weights and not mixed.scheme_of(names[1]).symmetric_weights
    assert config(reference_compat=True, module_bits={"ffn": 8}).scheme_of(names[0]).symmetric_weights is False
    assert QARVDConfig.from_dict(json.loads(json.dumps(mixed.to_dict(), sort_keys=True))) == mixed
    with pytest.raises(ValueError, match=r"module_bits is .*'ffn': 5.*expected 4 or 8 bits"):
        config(module_bits={"ffn": 5})


def test_mixed_layers_are_calibrated_saved_and_loaded(tiny_pipeline, tmp_path):
    mixed = config(module_bits={"ffn.net.2": 8, "attn1.to_q": 8, "attn1.to_k": 8, "attn1.to_v": 8})
    result = tiny_pipeline.calibrate(mixed)
    plain = tiny_pipeline.calibrate(config())
    for name, layer in result.layers.items():
        bits = 8 if "ffn.net.2" in name or ("attn1" in name and "to_out" not in name) else 4
        assert layer.description.weight_bits == bits, name
        assert torch.equal(layer.channel_order, plain.layers[name].channel_order)
        for key, tensor in layer.tensors().items():
            if key in ("input_scale", "channel_scale"):
                assert torch.equal(tensor, plain.layers[name].tensors()[key])
        original = tiny_pipeline.transformer.get_submodule(name).weight
        errors = [(each.layers[name].weight(torch.float32) - original).norm() for each in (result, plain)]
        assert errors[0] < errors[1] / 8 if bits == 8 else errors[0] == errors[1]
    result.save(tmp_path / "x.safetensors")
    assert CalibrationResult.load(tmp_path / "x.safetensors", mixed).modules() == result.modules()
    tiny_pipeline.quantize(mixed, result)
    tiny_pipeline.save_pretrained(tmp_path / "q")
    loaded = ARVDPipeline.from_pretrained(tmp_path / "q")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(video(loaded), video(tiny_pipeline)) and loaded.quantization.module_bits == mixed.module_bits
    assert "4-bit weights (8 bits in `ffn.net.2`, 8 bits in `attn1.to_q`" in (tmp_path / "q" / "README.md").read_text()


def test_layers_that_read_one_tensor_must_agree(tiny_pipeline):
    with pytest.raises(
        ValueError, match=r"module_bits gives \{'blocks.0.attn1.to_q': 8, .*same bits, or set tie_inputs"
    ):
        tiny_pipeline.calibrate(config(module_bits={"attn1.to_q": 8}))
    with pytest.raises(ValueError, match=r"module_bits names \['fn'\], which no module"):
        tiny_pipeline.calibrate(config(module_bits={"fn": 8}))
    tiny_pipeline.calibrate(config("w4a16", rounding="nearest", tie_inputs=False, module_bits={"attn1.to_q": 8}))


def test_errors_are_those_of_one_group_alone(tiny_pipeline):
    public = config("w4a16", chunk_weights=(3.0, 1.0))
    before = video(tiny_pipeline)
    errors = layer_errors(tiny_pipeline, public, PROMPTS[:1], num_chunks=2, seed=1)
    assert torch.equal(video(tiny_pipeline), before) and len(errors) == 2 + 2 * 7 and min(errors.values()) > 0
    group = next(group for group in errors if "blocks.1.attn1.to_k" in group)
    result = tiny_pipeline.calibrate(public)
    alone = CalibrationResult({name: result.layers[name] for name in group}, result.config_hash)
    tiny_pipeline.quantize(public, alone)
    per_chunk = (video(tiny_pipeline) - before).double().square().unflatten(2, (2, 3)).mean(dim=(0, 1, 3, 4, 5))
    assert errors[group] == pytest.approx((1.5 * per_chunk[0] + 0.5 * per_chunk[1]).item() / 2, rel=1e-6)


def test_measuring_goes_on_where_it_was_interrupted(tiny_pipeline, tmp_path, monkeypatch, caplog):
    """Killed after 20 of 34 rollouts; another process knows the 18 errors, and measures 14 after the float rollout."""
    public, stream, rollouts = config("w4a16"), tiny_pipeline.stream, []
    tiny_pipeline.calibrate(public)

    def counted(prompt, **options):
        rollouts.append(prompt)
        if len(rollouts) == 21:
            raise KeyboardInterrupt
        return stream(prompt, **options)

    tiny_pipeline.stream = counted
    with pytest.raises(KeyboardInterrupt):
        layer_errors(tiny_pipeline, public, PROMPTS)
    errors = layer_errors(tiny_pipeline, public, PROMPTS)
    assert len(rollouts) - 21 == 1 + 14
    assert layer_errors(tiny_pipeline, public, PROMPTS) == errors and len(rollouts) == 36
    (file,) = (tmp_path / "cache" / "layer_errors").iterdir()
    file.write_text("[1]")
    assert layer_errors(tiny_pipeline, public, PROMPTS) == errors and len(rollouts) == 36 + 34
    assert f"{file.name}: holds [1], expected an object" in caplog.text
    layer_errors(tiny_pipeline, public, PROMPTS, seed=5)  # another measurement
    assert len(rollouts) == 36 + 2 * 34


def test_the_costliest_per_byte_that_fit():
    errors, sizes = {("a",): 8.0, ("b",): 6.0, ("c",): 1.0, ("d",): 2.0}, {("a",): 8, ("b",): 2, ("c",): 1, ("d",): 4}
    assert most_costly(errors, sizes, 7) == [("b",), ("c",), ("d",)]
    assert most_costly(errors, sizes, 0.5) == []


def test_choosing(tiny_pipeline):
    chosen = tiny_pipeline.choose_bits(config("w4a16"), 0.2)
    layers = tiny_pipeline.calibrate(chosen).layers
    size = {name: layer.weight_packed.shape[0] * layer.channel_order.numel() for name, layer in layers.items()}
    large = sum(size[name] for name, layer in layers.items() if layer.description.weight_bits == 8)
    assert set(chosen.module_bits.values()) == {8} and 0 < large <= 0.2 * sum(size.values())
    for bad, match in ((config("w8a16"), "starts from 4-bit"), (chosen, "starts from 4-bit")):
        with pytest.raises(ValueError, match=match):
            tiny_pipeline.choose_bits(bad, 0.2)
    with pytest.raises(ValueError, match=r"budget is 10, expected a share"):
        tiny_pipeline.choose_bits(config("w4a16"), 10)
