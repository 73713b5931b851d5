"""Components as users change them: compiled, replaced, foreign; and what is saved of a pipeline that is not ours."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    HeliosTransformer3DModel,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from lora_files import as_file, random_lora
from safetensors.torch import load_file
from test_third_party import Denoiser, ToyPipeline
from tiny_pipeline import build_transformer, build_vae
from tiny_wan import make_wan22_vae

from qarvd_diffusers import ARVDPipeline, FewStepRenoiseScheduler, QARVDConfig
from qarvd_diffusers.calibration.calibrate import calibrate
from qarvd_diffusers.calibration.switch import QuantizationSwitch
from qarvd_diffusers.calibration.targets import base_linears
from qarvd_diffusers.conversion import save_single_file
from qarvd_diffusers.models import CausalWanTransformer3DModel
from qarvd_diffusers.pipelines.quantizable import QuantizableMixin
from qarvd_diffusers.quantization.install import apply, quantized_layers
from qarvd_diffusers.quantization.model import describe_modules, quantized_linears
from qarvd_diffusers.quantizer import attach
from qarvd_diffusers.vae.streaming import StreamingVAEDecoder

PROMPT = "a red circle moves left"


def generate(pipe, **kwargs):
    generator = torch.Generator().manual_seed(7)
    return pipe(PROMPT, **{"num_chunks": 2, "generator": generator, "output_type": "latent", **kwargs}).frames


def compiled(module):
    return torch.compile(module, backend="eager")


# torch.compile.


@pytest.mark.parametrize("scheme", ("w8a8_dynamic", "w8a8"))
def test_quantize_a_compiled_model(tiny_pipeline, tmp_path, scheme):
    """Also one that has run, and so is compiled to code without the hooks of a calibration."""
    config = QARVDConfig(scheme, calibration_prompts=(PROMPT,), calibration_chunks=1, rounding="nearest")
    expected = generate(tiny_pipeline)
    tiny_pipeline.transformer = compiled(tiny_pipeline.transformer)
    torch.testing.assert_close(generate(tiny_pipeline), expected)
    tiny_pipeline.quantize(config, tiny_pipeline.calibrate(config, use_cache=False))
    names = list(quantized_linears(tiny_pipeline.transformer))
    assert names and names == list(tiny_pipeline.quantization.modules) and "_orig_mod" not in "".join(names)
    quantized = generate(tiny_pipeline)
    tiny_pipeline.save_pretrained(tmp_path)
    again = ARVDPipeline.from_pretrained(tmp_path)
    assert all(
        torch.equal(again.transformer.state_dict()[k], v) for k, v in tiny_pipeline.transformer.state_dict().items()
    )
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(again), quantized)
    WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer")


def test_functions_take_a_compiled_model_as_it_is(tiny_pipeline, tmp_path):
    plain = tiny_pipeline.transformer
    wrapped = compiled(plain)
    save_single_file(plain, tiny_pipeline.config, tmp_path / "plain.safetensors")
    save_single_file(wrapped, tiny_pipeline.config, tmp_path / "wrapped.safetensors")
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "wrapped"))
    assert first.keys() == second.keys()
    assert list(base_linears(wrapped)) == list(base_linears(plain))
    config = QARVDConfig("w8a8_dynamic")
    result = calibrate(wrapped, print, config)
    with QuantizationSwitch(wrapped, quantized_layers(wrapped, result)) as switch:
        switch.set(True)
        assert quantized_linears(plain).keys() == result.layers.keys()
    apply(wrapped, result)
    attach(wrapped, config)
    assert describe_modules(wrapped) == plain.config.quantization_config.modules
    assert CausalWanTransformer3DModel.from_transformer(wrapped) is plain
    assert (
        type(CausalWanTransformer3DModel.from_transformer(compiled(build_transformer())))
        is CausalWanTransformer3DModel
    )
    latents = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    decoded = [StreamingVAEDecoder(vae).decode(latents) for vae in (tiny_pipeline.vae, compiled(tiny_pipeline.vae))]
    assert torch.equal(*decoded)


def test_a_compiled_part_is_refused_by_name(tiny_pipeline):
    blocks = tiny_pipeline.transformer.blocks
    blocks[1] = compiled(blocks[1])
    with pytest.raises(ValueError, match=r"blocks\.1 is wrapped by torch\.compile\(\).*compile_repeated_blocks"):
        tiny_pipeline.quantize(QARVDConfig("w8a8_dynamic"))


def test_loras_on_a_compiled_model(tiny_pipeline):
    pytest.importorskip("peft", reason="pip install -e '.[test]'")
    lora = as_file(random_lora(tiny_pipeline.transformer), "comfyui")
    base, outputs = generate(tiny_pipeline), []
    for wrap in (False, True):
        if wrap:
            tiny_pipeline.transformer = compiled(tiny_pipeline.transformer)
        tiny_pipeline.load_lora_weights(lora, adapter_name="style")
        tiny_pipeline.set_adapters("style", 0.5)
        outputs.append(generate(tiny_pipeline))
        tiny_pipeline.unload_lora_weights()
        torch.testing.assert_close(generate(tiny_pipeline), base)
    torch.testing.assert_close(*outputs)
    assert (outputs[0] - base).abs().max() > 0.01


def test_every_compiled_component_streams(tiny_pipeline):
    expected = generate(tiny_pipeline, output_type="pt")
    for name in ("transformer", "vae", "text_encoder"):
        setattr(tiny_pipeline, name, compiled(getattr(tiny_pipeline, name)))
        assert getattr(tiny_pipeline, name)._compiled_call_impl is not None
    torch.testing.assert_close(generate(tiny_pipeline, output_type="pt"), expected)


def test_a_stock_transformer_compiled_in_place_runs(tiny_pipeline, caplog):
    stock = build_transformer()
    stock.compile(backend="eager")
    tiny_pipeline.transformer = stock
    assert "call compile() on the pipeline's" in caplog.text
    assert generate(tiny_pipeline).isfinite().all()


# Assigned components.


@pytest.mark.parametrize("kind", (UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler))
def test_assigning_a_scheduler_is_constructing_with_it(tiny_pipeline, caplog, kind):
    expected = generate(tiny_pipeline)
    tiny_pipeline.scheduler = kind()
    assert type(tiny_pipeline.scheduler) is FewStepRenoiseScheduler
    assert "timestep_shift" in caplog.text and kind.__name__ in caplog.text
    assert torch.equal(generate(tiny_pipeline), expected)
    with pytest.raises(ValueError, match=r"disagree on \['timestep_shift'\]"):
        tiny_pipeline.scheduler = FewStepRenoiseScheduler(timestep_shift=3.0)


def test_assigning_a_vae_is_constructing_with_it(tiny_pipeline):
    """One of another scale, as Wan 2.2's: pictures are 16 times the latents."""
    tiny_pipeline.vae = make_wan22_vae()
    built = ARVDPipeline(**tiny_pipeline.components, height=64, width=96)
    assert tiny_pipeline.vae_scale_factor_spatial == built.vae_scale_factor_spatial == 16
    assert generate(tiny_pipeline, height=64, width=96, output_type="pt", num_chunks=1).shape == (1, 9, 3, 64, 96)
    tiny_pipeline.vae = None  # to save memory: what comes out stays 16 times as large
    assert tiny_pipeline.vae_scale_factor_spatial == 16
    tiny_pipeline.vae = build_vae()
    assert tiny_pipeline.vae_scale_factor_spatial == 8


def tiny_helios():
    return HeliosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_dim=(4, 6, 6),
    )  # fmt: skip


def test_another_architecture_is_refused_at_once(tiny_pipeline, tmp_path):
    with pytest.raises(TypeError, match="transformer is a HeliosTransformer3DModel, expected a WanTransformer3DModel"):
        tiny_pipeline.transformer = tiny_helios()
    index = {"_class_name": "HeliosPipeline", "transformer": ["diffusers", "HeliosTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has a HeliosTransformer3DModel, ARVDPipeline runs a Wan.*HeliosPipeline"):
        ARVDPipeline.from_pretrained(tmp_path)


def test_sequential_offload_finds_rows_in_natural_order(tiny_pipeline):
    """A fused pass lays rows out for its kernels; offloaded weights come back from the state dict, which does not."""
    config = QARVDConfig("w8a8", calibration_prompts=(PROMPT,), calibration_chunks=1)
    tiny_pipeline.quantize(config, tiny_pipeline.calibrate(config, use_cache=False))
    tiny_pipeline.transformer.fused_pass = True
    expected = generate(tiny_pipeline)
    layers = quantized_linears(tiny_pipeline.transformer).values()
    assert any(layer._row_order.numel() for layer in layers)
    tiny_pipeline.enable_sequential_cpu_offload(device="cpu")
    assert all(layer.weight_packed.is_meta and not layer._row_order.numel() for layer in layers)
    tiny_pipeline.remove_all_hooks()
    assert (generate(tiny_pipeline) - expected).abs().max() < 1e-2


# Features of diffusers that a causal model cannot honour.


@pytest.mark.parametrize(
    "config",
    (PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 500), FirstBlockCacheConfig(threshold=0.1)),
)
def test_block_skipping_caches_are_refused(tiny_pipeline, config):
    with pytest.raises(ValueError, match=rf"enable_cache\({type(config).__name__}\) .*K/V cache"):
        tiny_pipeline.transformer.enable_cache(config)
    stock = build_transformer()
    stock.enable_cache(config)
    with pytest.raises(ValueError, match=r"K/V cache .*disable_cache\(\) first"):
        tiny_pipeline.transformer = stock


def test_layerwise_casting_is_refused_on_packed_weights(tiny_pipeline):
    tiny_pipeline.quantize(QARVDConfig("w8a8_dynamic"))
    with pytest.raises(ValueError, match="enable_layerwise_casting"):
        tiny_pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)


def test_what_callbacks_ask_of_a_pipeline(tiny_pipeline):
    pipe, seen = tiny_pipeline, []
    assert (pipe.current_timestep, pipe.num_timesteps, pipe.interrupt) == (None, None, False)

    def on_pass(info):
        seen.append(pipe.current_timestep == info.timestep)

    generate(pipe, on_pass=on_pass)
    assert len(seen) == 10 and all(seen) and pipe.current_timestep is None


# Pipelines that are not ours.


def test_a_foreign_scheduler_is_saved_as_it_is(tmp_path):
    class Foreign(ToyPipeline):
        _optional_components = ("scheduler",)

    pipe = Foreign(Denoiser(), FewStepRenoiseScheduler())
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.quantize(QARVDConfig("w8a8_dynamic"))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["shift"] == 3.0
    assert (tmp_path / "pipeline.py").read_text() == "from test_components import Foreign\n"
    card = (tmp_path / "README.md").read_text()
    assert "from test_components import Foreign" in card and "ARVDPipeline" not in card
    with pytest.raises(ValueError, match="kv_cache is 'int8', but this pipeline's make_cache takes no storage"):
        ToyPipeline(Denoiser()).stream("abc", num_chunks=1, kv_cache="int8")
    with pytest.raises(
        ValueError, match="scheduler is a FlowMatchEulerDiscreteScheduler, which has no timesteps per chunk"
    ):
        pipe.stream("abc", num_chunks=1)


def test_a_stock_pipeline_that_only_wants_quantization(tiny_pipeline, tmp_path):
    class Quantizable(QuantizableMixin, WanPipeline):
        """Whole videos, no streams."""

    parts = {name: getattr(tiny_pipeline, name) for name in ("tokenizer", "text_encoder", "vae")}
    pipe = Quantizable(**parts, scheduler=UniPCMultistepScheduler(flow_shift=3.0), transformer=build_transformer())
    pipe.quantize(QARVDConfig("w8a8_dynamic"))
    pipe.save_pretrained(tmp_path)
    stock = WanPipeline.from_pretrained(tmp_path)
    assert stock.scheduler.config.flow_shift == 3.0 and type(stock.scheduler) is UniPCMultistepScheduler
    assert (tmp_path / "pipeline.py").read_text() == "from test_components import Quantizable\n"
