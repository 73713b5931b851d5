"""`from_pretrained(..., quantization_config=...)`: calibrates float folders, loads quantized ones, or raises."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, WanTransformer3DModel

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.calibration import calibrate as calibrate_module
from qarvd_diffusers.calibration.pipeline import PROMPTS_FILE
from qarvd_diffusers.cli import main
from qarvd_diffusers.evaluation.fidelity import evaluate
from qarvd_diffusers.files.cache import cache_folder
from qarvd_diffusers.quantization.model import quantized_linears

PROMPTS = ("a red circle", "a blue square")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def float_folder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def config(scheme: str = "w8a8", **changes) -> QARVDConfig:
    return QARVDConfig(scheme, calibration_prompts=PROMPTS, calibration_chunks=2, **changes)


def load(folder, **kwargs) -> ARVDPipeline:
    pipe = ARVDPipeline.from_pretrained(folder, dtype=torch.float32, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: ARVDPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return pipe("a red circle", num_chunks=2, generator=generator, output_type="latent").frames


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16", "w8a16", "w8a8_dynamic", "w4a8_dynamic"])
def test_quantize_save_reload_is_bit_identical(float_folder, tmp_path, scheme):
    pipe = load(float_folder, quantization_config=config(scheme))
    assert len(quantized_linears(pipe.transformer)) == 2 * 10 + 2
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path / "quantized")
    assert torch.equal(generate(load(tmp_path / "quantized")), expected)
    float_error = (expected - generate(load(float_folder))).norm() / expected.norm()
    assert 0 < float_error < (0.6 if scheme.startswith("w4") else 0.1)


def test_other_doors_to_the_same_checkpoint(float_folder, tmp_path):
    pipe = load(float_folder, quantization_config=config())
    pipe.save_pretrained(tmp_path / "quantized")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "quantized", subfolder="transformer", dtype=torch.float32)
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor), name
    generic = DiffusionPipeline.from_pretrained(
        str(tmp_path / "quantized"),
        custom_pipeline=str(tmp_path / "quantized"),
        trust_remote_code=True,
        dtype=torch.float32,
    )
    generic.set_progress_bar_config(disable=True)
    assert torch.equal(generate(generic), generate(pipe))


def test_config_forms(float_folder):
    expected = generate(load(float_folder, quantization_config=config("w8a16")))
    as_dict = {"quant_method": "qarvd", "scheme": "w8a16"}
    mapped = PipelineQuantizationConfig(quant_mapping={"transformer": config("w8a16")})
    for form in (as_dict, mapped):
        assert torch.equal(generate(load(float_folder, quantization_config=form)), expected)
    with pytest.raises(ValueError, match="str"):
        load(float_folder, quantization_config="w8a8")
    with pytest.raises(ValueError, match="transfromer"):
        load(float_folder, quantization_config=PipelineQuantizationConfig(quant_mapping={"transfromer": config()}))


def test_calibration_is_cached_by_content(float_folder, monkeypatch):
    first = load(float_folder, quantization_config=config())
    assert len(list(cache_folder().rglob("*.safetensors"))) == 1

    def never(*args, **kwargs):
        raise AssertionError("calibrated twice")

    monkeypatch.setattr("qarvd_diffusers.calibration.pipeline.calibrate", never)
    second = load(float_folder, quantization_config=config())
    assert torch.equal(generate(first), generate(second))
    with pytest.raises(AssertionError, match="twice"):
        load(float_folder, quantization_config=config(calibration_seed=1))
    with pytest.raises(AssertionError, match="twice"):
        load(float_folder, quantization_config=config().replace(calibration_prompts=("another",)))
    assert calibrate_module.calibrate is not never


def test_calibration_leaves_nothing_behind(float_folder):
    pipe = load(float_folder)
    before, expected = dict(pipe.transformer.state_dict()), generate(pipe)
    pipe.calibrate(config())
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pipe.transformer.modules())
    assert torch.equal(generate(pipe), expected)


def test_prompts_of_the_model_folder_come_first(float_folder):
    (float_folder / PROMPTS_FILE).write_text("a red circle\na blue square\n")
    own = load(float_folder, quantization_config=config().replace(calibration_prompts=None))
    assert torch.equal(generate(own), generate(load(float_folder, quantization_config=config())))


def test_quantized_checkpoint_with_another_config(float_folder, tmp_path):
    load(float_folder, quantization_config=config("w8a16")).save_pretrained(tmp_path / "quantized")
    load(tmp_path / "quantized", quantization_config=QARVDConfig("w8a16"))
    with pytest.raises(ValueError, match="stored 'w8a16', passed 'w4a16'"):
        load(tmp_path / "quantized", quantization_config=QARVDConfig("w4a16"))
    with pytest.raises(ValueError, match="quantized already"):
        load(tmp_path / "quantized").quantize(QARVDConfig("w8a8"))


def test_checkpoint_holds_neither_prompts_nor_local_paths(float_folder, tmp_path):
    load(float_folder, quantization_config=config()).save_pretrained(tmp_path / "quantized")
    for path in (tmp_path / "quantized").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"a blue square" not in content and str(tmp_path).encode() not in content, path


def test_portable_layout_and_card(float_folder, tmp_path):
    reference, pipe = load(float_folder), load(float_folder, quantization_config=config("w4a8"))
    report = evaluate(reference, pipe, PROMPTS, num_chunks=2)
    pipe.save_pretrained(tmp_path / "quantized", report=report)
    index = json.loads((tmp_path / "quantized" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    transformer = json.loads((tmp_path / "quantized" / "transformer" / "config.json").read_text())
    assert transformer["_class_name"] == "WanTransformer3DModel"
    assert transformer["quantization_config"]["scheme"] == "w4a8"
    assert (tmp_path / "quantized" / "pipeline.py").read_text().strip() == "from qarvd_diffusers import ARVDPipeline"
    card = (tmp_path / "quantized" / "README.md").read_text()
    assert f"| 0 | {report['psnr_db'][0]:.2f} |" in card and "4-bit weights" in card


def test_failed_save_leaves_nothing(float_folder, tmp_path, monkeypatch):
    pipe = load(float_folder, quantization_config=config("w8a16"))

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(pipe.vae, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        pipe.save_pretrained(tmp_path / "quantized")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float"]


def test_cast_and_from_pipe(float_folder):
    pipe = load(float_folder, quantization_config=config("w8a16"))
    expected = generate(pipe)
    twin = ARVDPipeline.from_pipe(pipe)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(generate(twin), expected)
    pipe.to(torch.bfloat16)
    assert quantized_linears(pipe.transformer)["blocks.0.attn1.to_q"].weight_scale.dtype == torch.float32


def test_int8_text_encoder(float_folder, tmp_path):
    pipe = load(float_folder, quantization_config=config("w8a16", text_encoder="int8"))
    plain = load(float_folder, quantization_config=config("w8a16"))
    a, b = (p.encode_prompt("a red circle") for p in (pipe, plain))
    error = (a - b).norm() / b.norm()
    assert 0 < error < 0.05
    pipe.save_pretrained(tmp_path / "quantized")
    reloaded = load(tmp_path / "quantized")
    assert torch.equal(reloaded.encode_prompt("a red circle"), a)
    assert torch.equal(generate(reloaded), generate(pipe))


def test_truncated_weights_are_named_with_the_remedy(float_folder, tmp_path):
    load(float_folder, quantization_config=config("w8a16")).save_pretrained(tmp_path / "quantized")
    path = tmp_path / "quantized" / "transformer" / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors.*download or save it again"):
        load(tmp_path / "quantized")


def test_pickled_weights_are_never_the_fallback(float_folder):
    path = float_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({}, path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(float_folder)


def test_a_cache_is_not_needed(tiny_pipeline, tmp_path, monkeypatch, caplog):
    """A folder that cannot be made, and one with damaged results: the outcome is the same, and one line says why."""
    want = tiny_pipeline.calibrate(config()).layers
    (kept,) = (tmp_path / "cache" / "calibration").iterdir()
    kept.write_bytes(kept.read_bytes()[:-10])
    results = [tiny_pipeline.calibrate(config()).layers]
    assert f"A cached calibration is not used: {kept}" in caplog.text
    monkeypatch.setenv("QARVD_CACHE", str(kept / "below a file"))
    results.append(tiny_pipeline.calibrate(config()).layers)
    assert "Set QARVD_CACHE" in caplog.text and "below a file cannot be written to" in caplog.text
    for layers in results:
        assert all(torch.equal(layers[name].weight_packed, layer.weight_packed) for name, layer in want.items())
    caplog.clear()
    assert tiny_pipeline.choose_bits(config("w4a16"), 0.2).module_bits
    assert "Set QARVD_CACHE" in caplog.text


def test_a_quantized_model_is_refused_before_work(tiny_pipeline, tmp_path, monkeypatch, capsys):
    tiny_pipeline.quantize(QARVDConfig("w8a8_dynamic"))
    tiny_pipeline.save_pretrained(tmp_path / "quantized")

    def work(*args, **kwargs):
        raise AssertionError("a video was generated")

    monkeypatch.setattr(ARVDPipeline, "stream", work)
    assert main(["quantize", str(tmp_path / "quantized"), str(tmp_path / "out")]) == 1
    assert "quantized already (w8a8_dynamic)" in capsys.readouterr().err and not (tmp_path / "out").exists()
    for job in (
        lambda: tiny_pipeline.measure_sensitivity(config(), PROMPTS, num_chunks=2),
        lambda: tiny_pipeline.choose_bits(config("w4a16"), 0.2),
        lambda: tiny_pipeline.calibrate(config()),
    ):
        with pytest.raises(ValueError, match="quantized already"):
            job()
