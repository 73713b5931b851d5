"""LoRA on float and quantized pipelines: the truth is a float model whose weights have the adapter added."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from lora_files import LAYOUTS, as_file, random_lora
from safetensors import safe_open
from safetensors.torch import save_file

from qarvd_diffusers import QARVDConfig
from qarvd_diffusers.config import SCHEMES
from qarvd_diffusers.conversion import merge_lora, read_lora
from qarvd_diffusers.conversion.names import weight_name
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline
from qarvd_diffusers.quantization.adapters import adapter_scales
from qarvd_diffusers.quantization.install import dequantize
from qarvd_diffusers.quantization.linear import QARVDLinear
from qarvd_diffusers.quantization.model import quantized_linears

peft = pytest.importorskip("peft", reason="pip install -e '.[test]'")
PROMPTS = ("a red circle moves left",)


def generate(pipe, num_chunks=2):
    generator = torch.Generator().manual_seed(7)
    return pipe("a red circle", num_chunks=num_chunks, generator=generator, output_type="latent").frames


def quantized(pipe, scheme):
    config = QARVDConfig(scheme, calibration_prompts=PROMPTS, calibration_chunks=2, outlier_alignment=4)
    pipe.quantize(config, pipe.calibrate(config, use_cache=False))
    return pipe


def merged(transformer, lora, scale=1.0):
    """A float transformer with the adapter added to its (de-quantized) weights."""
    transformer = copy.deepcopy(transformer)
    dequantize(transformer)
    transformer.is_quantized = False
    for name, layer in lora.items():
        weight = transformer.get_parameter(weight_name(name))
        bias = transformer.get_parameter(f"{name}.bias") if layer.bias is not None else None
        new_weight, new_bias = merge_lora(weight.data, None if bias is None else bias.data, layer, scale)
        weight.data = new_weight
        if bias is not None:
            bias.data = new_bias
    return transformer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantized_with_adapter_equals_dequantized_with_adapter(tiny_pipeline, layout, tmp_path):
    """Weight-only: the whole video, every layout, from a file."""
    pipe = quantized(tiny_pipeline, "w4a16")
    base, lora = generate(pipe), random_lora(pipe.transformer)
    sizes = {name: pipe.config[name] for name in ("height", "width", "max_sequence_length")}
    truth = ARVDPipeline(**{**pipe.components, "transformer": merged(pipe.transformer, lora)}, **sizes)
    save_file(as_file(lora, layout), tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="style")
    with_lora, want = generate(pipe), generate(truth)
    assert (with_lora - want).abs().max() < 1e-5
    assert (with_lora - base).abs().max() > 0.05
    assert len(quantized_linears(pipe.transformer)) == 22
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), base)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_adds_the_same_products(tiny_pipeline, scheme):
    """A layer computes its quantized product plus the adapter's, for the input it quantizes without an adapter."""
    pipe = quantized(tiny_pipeline, scheme)
    lora = random_lora(pipe.transformer)
    pipe.load_lora_weights(as_file(lora, "comfyui"))
    for name, layer in lora.items():
        wrapped = pipe.transformer.get_submodule(name)
        x = torch.randn(2, 5, layer.down.shape[1])
        want = wrapped.base_layer(x) + x @ layer.delta().T
        assert isinstance(wrapped.base_layer, QARVDLinear)
        torch.testing.assert_close(wrapped(x), want, rtol=1e-5, atol=1e-5)


def test_several_adapters_with_scales(tiny_pipeline):
    pipe = quantized(tiny_pipeline, "w8a16")
    name = "blocks.1.ffn.net.2"
    first = random_lora(pipe.transformer, seed=1, ranks={name: 5})  # mixed ranks
    second = random_lora(pipe.transformer, rank=2, alpha=0.5, seed=2)
    pipe.load_lora_weights(as_file(first, "kohya"), adapter_name="first")
    pipe.load_lora_weights(as_file(second, "diffusers"), adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.5, -2.0])
    assert adapter_scales(pipe.transformer) == {"first": 0.5, "second": -2.0}
    layer, x = pipe.transformer.get_submodule(name), torch.randn(3, first[name].down.shape[1])
    want = layer.base_layer(x) + x @ (0.5 * first[name].delta() - 2.0 * second[name].delta()).T
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    pipe.set_adapters("second")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ second[name].delta().T, rtol=1e-5, atol=1e-5)
    pipe.disable_lora()
    assert torch.equal(layer(x), layer.base_layer(x)) and adapter_scales(pipe.transformer) == {}
    pipe.enable_lora()
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters() == {"transformer": ["first"]}


def test_peft_add_adapter_trains(tiny_pipeline):
    pipe = quantized(tiny_pipeline, "w4a8")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"], init_lora_weights="gaussian")
    pipe.transformer.add_adapter(config, adapter_name="mine")
    trainable = [p for p in pipe.transformer.parameters() if p.requires_grad]
    assert len(trainable) == 2 * 6
    latents = torch.randn(1, 4, 3, 4, 6)
    flow = pipe.transformer(latents, torch.tensor([500.0]), torch.randn(1, 12, 16), return_dict=False)[0]
    flow.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
    assert any(p.grad.abs().max() > 0 for p in trainable)


def test_fusing_is_refused_by_every_way_in(tiny_pipeline):
    pipe = quantized(tiny_pipeline, "w8a8")
    pipe.load_lora_weights(as_file(random_lora(pipe.transformer), "diffusers"))
    before = generate(pipe, 1)
    with pytest.raises(ValueError, match=r"fuse_lora\(\) cannot change packed integer weights"):
        pipe.fuse_lora()
    layer = pipe.transformer.blocks[0].attn1.to_q
    for safe in (False, True):
        with pytest.raises(ValueError, match=r"would be lost\. Keep the adapter unmerged"):
            layer.merge(safe_merge=safe)
    assert layer.merged_adapters == [] and torch.equal(generate(pipe, 1), before)


def test_the_weight_can_be_read_but_not_written(tiny_pipeline):
    layer = quantized(tiny_pipeline, "w8a8").transformer.blocks[0].attn1.to_q
    plain = layer.dequantized()
    assert torch.equal(layer.weight, plain) and type(layer.weight * 2) is type(layer.weight.data) is torch.Tensor
    assert (layer.weight.shape, layer.weight.dtype) == (plain.shape, plain.dtype)
    plain.add_(layer.weight)  # as a source it is like any other

    def set_data(weight):
        weight.data = plain

    writes = (
        set_data,
        lambda w: w.add_(1),
        lambda w: w.copy_(plain),
        lambda w: w.__iadd__(1),
        lambda w: w.__setitem__(0, 1),
    )
    for write in writes:
        with pytest.raises(ValueError, match="packed integers"):
            write(layer.weight)


def test_adapters_do_not_cost_a_dequantization(tiny_pipeline, monkeypatch):
    """PEFT reads the weight's dtype and device dozens of times; at 14B each read of its values would take a second."""
    pipe, seen = quantized(tiny_pipeline, "w8a16"), []
    original = QARVDLinear.dequantized
    monkeypatch.setattr(QARVDLinear, "dequantized", lambda layer: seen.append(layer) or original(layer))
    pipe.load_lora_weights(as_file(random_lora(pipe.transformer), "kohya"), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    generate(pipe, 1)
    pipe.unload_lora_weights()
    assert not seen


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_calibrating_with_an_adapter(tiny_pipeline, rounding, tmp_path):
    """Ranges are those of the adapted model, the checkpoint names the adapters, and reloading gives the same video."""
    lora = as_file(random_lora(tiny_pipeline.transformer), "diffusers")
    options = {"calibration_prompts": PROMPTS, "calibration_chunks": 2, "outlier_alignment": 4, "rounding": rounding}
    config = QARVDConfig("w8a8", **options)
    plain = tiny_pipeline.calibrate(config, use_cache=False)
    tiny_pipeline.load_lora_weights(dict(lora), adapter_name="style")
    tiny_pipeline.set_adapters("style", 0.5)
    adapted = tiny_pipeline.calibrate(config, use_cache=False)
    assert adapted.layers.keys() == plain.layers.keys()
    name = "blocks.1.ffn.net.2"
    assert not torch.equal(adapted.layers[name].input_scale, plain.layers[name].input_scale)
    tiny_pipeline.quantize(config, adapted)
    assert tiny_pipeline.quantization.calibration_adapters == {"style": 0.5}
    want = generate(tiny_pipeline)
    with pytest.raises(ValueError, match="unload_lora_weights"):
        tiny_pipeline.save_pretrained(tmp_path / "refused")
    tiny_pipeline.unload_lora_weights()
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    loaded = ARVDPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.quantization.calibration_adapters == {"style": 0.5}
    loaded.load_lora_weights(dict(lora), adapter_name="style")
    loaded.set_adapters("style", 0.5)
    assert torch.equal(generate(loaded), want)


def test_uneven_scales_cannot_be_recorded(tiny_pipeline):
    tiny_pipeline.load_lora_weights(as_file(random_lora(tiny_pipeline.transformer), "diffusers"), adapter_name="style")
    tiny_pipeline.transformer.blocks[0].attn1.to_q.set_scale("style", 0.3)
    with pytest.raises(ValueError, match=r"adapters \['style'\] have different scales in different layers"):
        tiny_pipeline.calibrate(QARVDConfig("w8a8", calibration_prompts=PROMPTS), use_cache=False)


def test_adapters_of_another_model_change_nothing(tiny_pipeline):
    pipe = quantized(tiny_pipeline, "w8a16")
    lora = as_file(random_lora(pipe.transformer), "diffusers")
    deeper = {key.replace("blocks.1.", "blocks.29."): tensor for key, tensor in lora.items()}
    wider = {key: torch.cat([t, t], dim=1) if "lora_A" in key else t for key, t in lora.items()}
    for wrong, message in ((deeper, "the model has 2 blocks"), (wider, "have another size than the model's")):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(wrong)
    assert not hasattr(pipe.transformer, "peft_config") and pipe.get_list_adapters() == {}


def test_saved_by_diffusers_and_back(tiny_pipeline, tmp_path):
    """diffusers writes ranks and alphas into the header; they are taken from there."""
    pipe = quantized(tiny_pipeline, "w8a16")
    lora = random_lora(pipe.transformer, ranks={"blocks.0.attn1.to_q": 2})
    pipe.load_lora_weights(as_file(lora, "kohya"), adapter_name="style")
    want = generate(pipe, 1)
    pipe.transformer.save_lora_adapter(tmp_path, adapter_name="style")
    state_dict, metadata = ARVDPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert len(read_lora(state_dict)) == len(lora) and metadata
    pipe.unload_lora_weights()
    pipe.transformer.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(generate(pipe, 1), want)


def differences(transformer, size):
    """One tensor of every kind that adapter files hold beside pairs, by the name in the file."""
    width, inner = transformer.config.num_attention_heads * transformer.config.attention_head_dim, 48
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "blocks.0.norm3.diff": (width,),
        "blocks.1.norm3.diff_b": (width,),
        "blocks.0.self_attn.norm_q.diff": (width,),
        "blocks.1.cross_attn.norm_k.diff": (width,),
        "blocks.0.diff_m": (1, 6, width),
        "blocks.1.modulation.diff": (6, width),
        "head.modulation.diff": (1, 2, width),
        "blocks.1.ffn.2.diff_b": (width,),
        "head.head.diff_b": (16,),
        "blocks.0.ffn.0.diff": (inner, width),
        "blocks.0.ffn.2.diff": (width, inner),
        "patch_embedding.diff": (width, 4, 1, 2, 2),
        "patch_embedding.diff_b": (width,),
        "patch_embedding.lora_down.weight": (3, 4, 1, 2, 2),
        "patch_embedding.lora_up.weight": (width, 3, 1, 1, 1),
        "time_embedding.0.lora_down.weight": (2, 16, 1, 1),
        "time_embedding.0.lora_up.weight": (width, 2, 1, 1),
    }
    return {f"diffusion_model.{key}": torch.randn(shape, generator=generator) * size for key, shape in shapes.items()}


def same_parts(pipe, transformer):
    sizes = {name: pipe.config[name] for name in ("height", "width", "max_sequence_length")}
    return ARVDPipeline(**{**pipe.components, "transformer": transformer}, **sizes)


@pytest.mark.parametrize("scheme", [None, "w4a16"])
@pytest.mark.parametrize("alone", [False, True])
def test_differences_are_added_exactly(tiny_pipeline, scheme, alone):
    """Norms, modulation, biases, whole weights, patch embedding: scaled, disabled, deleted and unloaded like pairs."""
    pipe = tiny_pipeline if scheme is None else quantized(tiny_pipeline, scheme)
    base, before = generate(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    file = differences(pipe.transformer, 0.1)
    if not alone:
        file |= as_file(random_lora(pipe.transformer), "comfyui")
    lora = read_lora(file)
    truths = {scale: same_parts(pipe, merged(pipe.transformer, lora, scale)) for scale in (1.0, 0.5)}
    pipe.load_lora_weights(dict(file), adapter_name="style")
    for scale, truth in truths.items():
        pipe.set_adapters("style", scale)
        torch.testing.assert_close(generate(pipe), generate(truth), rtol=1e-4, atol=1e-4)
        for name in (
            "blocks.0.norm2.weight",
            "blocks.0.scale_shift_table",
            "scale_shift_table",
            "patch_embedding.bias",
        ):
            assert torch.equal(pipe.transformer.get_parameter(name), truth.transformer.get_parameter(name)), name
        assert adapter_scales(pipe.transformer) == {"style": scale}
    assert (generate(pipe) - base).abs().max() > 0.05
    pipe.disable_lora()
    assert torch.equal(pipe.transformer.patch_embedding.weight, before["patch_embedding.weight"])
    pipe.enable_lora()
    assert not torch.equal(pipe.transformer.patch_embedding.weight, before["patch_embedding.weight"])
    pipe.load_lora_weights({k: v * -2 for k, v in file.items() if ".diff" in k}, adapter_name="second")
    pipe.set_adapters(["style", "second"], [0.5, 0.25])  # what has a difference alone comes out at zero
    torch.testing.assert_close(pipe.transformer.blocks[0].norm2.weight, before["blocks.0.norm2.weight"])
    pipe.delete_adapters("second")
    assert torch.equal(pipe.transformer.blocks[0].norm2.weight, truths[0.5].transformer.blocks[0].norm2.weight)
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(generate(pipe), base)


@pytest.mark.parametrize("kind", [".diff", ".diff_b", ".diff_m"])
def test_differences_of_zero_change_nothing(tiny_pipeline, kind):
    plain = as_file(random_lora(tiny_pipeline.transformer), "comfyui")
    extra = {k: v for k, v in differences(tiny_pipeline.transformer, 0.0).items() if k.endswith(kind)}
    tiny_pipeline.load_lora_weights(dict(plain), adapter_name="style")
    want = generate(tiny_pipeline, 1)
    tiny_pipeline.unload_lora_weights()
    tiny_pipeline.load_lora_weights({**plain, **extra}, adapter_name="style")
    assert len(extra) >= 1 and torch.equal(generate(tiny_pipeline, 1), want)


def test_scale_of_one_call_and_refused_saves(tiny_pipeline, tmp_path):
    """`attention_kwargs` scales for one pass; differences are not saved as if they were the model's own weights."""
    transformer = tiny_pipeline.transformer
    tiny_pipeline.load_lora_weights(differences(transformer, 0.1), adapter_name="style")
    before = transformer.patch_embedding.weight.clone()
    seen = []
    hook = transformer.patch_embedding.register_forward_pre_hook(lambda module, _: seen.append(module.weight.clone()))
    inputs = torch.randn(1, 4, 3, 4, 6), torch.tensor([500.0]), torch.randn(1, 12, 16)
    with torch.no_grad():
        transformer(*inputs, attention_kwargs={"scale": 0.0})
        transformer(*inputs, attention_kwargs={"scale": 0.5})
    hook.remove()
    tiny_pipeline.disable_lora()
    base = transformer.patch_embedding.weight.clone()
    tiny_pipeline.enable_lora()
    assert torch.equal(seen[0], base) and torch.equal(transformer.patch_embedding.weight, before)
    torch.testing.assert_close(seen[1], (base + before) / 2)
    with pytest.raises(ValueError, match="unload_lora_weights"):
        tiny_pipeline.save_single_file(tmp_path / "model.safetensors")


def test_differences_are_saved_with_their_adapter(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline
    pipe.load_lora_weights(differences(pipe.transformer, 0.1), adapter_name="style")
    want = generate(pipe, 1)
    layers = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    config = pipe.transformer.peft_config["style"].to_dict()
    config = {name: config[name] for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_bias")}
    config["target_modules"] = sorted(pipe.transformer.peft_config["style"].target_modules)
    pipe.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, adapter_name="again")
    assert torch.equal(generate(pipe, 1), want)


def test_fusing_and_swapping_differences(tiny_pipeline):
    pipe = tiny_pipeline
    base, file = generate(pipe, 1), differences(pipe.transformer, 0.1)
    pipe.load_lora_weights(dict(file), adapter_name="style")
    with_lora = generate(pipe, 1)
    pipe.load_lora_weights({key: -value for key, value in file.items()}, adapter_name="style", hotswap=True)
    other = generate(pipe, 1)
    pipe.load_lora_weights(dict(file), adapter_name="style", hotswap=True)
    assert torch.equal(generate(pipe, 1), with_lora) and not torch.equal(other, with_lora)
    pipe.fuse_lora()
    torch.testing.assert_close(generate(pipe, 1), with_lora, rtol=1e-4, atol=1e-4)
    pipe.unfuse_lora()
    torch.testing.assert_close(generate(pipe, 1), with_lora, rtol=1e-4, atol=1e-4)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(generate(pipe, 1), with_lora, rtol=1e-4, atol=1e-4)
    assert not torch.equal(with_lora, base)


def test_fused_passes_hold_no_stale_copies(tiny_pipeline):
    """A fused pass copies norms and modulation: none is made while an adapter adds to these."""
    transformer = quantized(tiny_pipeline, "w8a8").transformer
    transformer.fused_pass = True
    base = generate(tiny_pipeline, 1)
    file = {key: value for key, value in differences(transformer, 0.1).items() if "norm3" in key or "diff_m" in key}
    before = transformer.fusion_refusal
    tiny_pipeline.load_lora_weights(file, adapter_name="style")
    assert before is None and "an adapter adds to parameters" in transformer.fusion_refusal
    assert (generate(tiny_pipeline, 1) - base).abs().max() > 1e-3
    tiny_pipeline.unload_lora_weights()
    assert transformer.fusion_refusal is None and torch.equal(generate(tiny_pipeline, 1), base)


@pytest.mark.parametrize("name", ["my.style", "", "keys"])
def test_names_that_no_module_can_have(tiny_pipeline, name):
    with pytest.raises(ValueError, match=f"adapter_name is {name!r}"):
        tiny_pipeline.load_lora_weights(differences(tiny_pipeline.transformer, 0.1), adapter_name=name)
    assert not hasattr(tiny_pipeline.transformer, "peft_config")
    assert not any("lora" in key for key in tiny_pipeline.transformer.state_dict())


def test_adapters_without_a_name(tiny_pipeline):
    """Each gets a free one, whichever layers they adapt."""
    file = as_file(random_lora(tiny_pipeline.transformer), "comfyui")
    parts = [{k: v for k, v in file.items() if f"blocks.{i}." in k} for i in (0, 1)]
    for part in (*parts, differences(tiny_pipeline.transformer, 0.1)):
        tiny_pipeline.load_lora_weights(part)
    assert sorted(tiny_pipeline.transformer.peft_config) == ["default_0", "default_1", "default_2"]


def test_differences_that_do_not_fit_change_nothing(tiny_pipeline):
    plain = as_file(random_lora(tiny_pipeline.transformer), "comfyui")
    for key, shape in (
        ("blocks.0.norm3.diff", (25,)),
        ("blocks.0.diff_m", (1, 2, 24)),
        ("blocks.1.ffn.2.diff_b", (48,)),
    ):
        with pytest.raises(ValueError, match="1 layers have another size than the model's"):
            tiny_pipeline.load_lora_weights({**plain, f"diffusion_model.{key}": torch.ones(shape)})
    with pytest.raises(ValueError, match="1 layers that the model does not have"):
        tiny_pipeline.load_lora_weights({**plain, "diffusion_model.blocks.7.norm3.diff": torch.ones(24)})
    assert not hasattr(tiny_pipeline.transformer, "peft_config")


def test_what_is_offloaded_to_the_meta_device_is_not_added_to(tiny_pipeline):
    transformer = tiny_pipeline.transformer
    transformer.patch_embedding.to("meta")
    with pytest.raises(
        ValueError, match=r"2 parameters that are offloaded .*patch_embedding.*enable_sequential_cpu_offload"
    ):
        tiny_pipeline.load_lora_weights(differences(transformer, 0.1))
    assert not hasattr(transformer, "peft_config")


def test_files_that_cannot_be_read_are_named(tiny_pipeline, tmp_path):
    file = as_file(random_lora(tiny_pipeline.transformer), "comfyui")
    save_file(file, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-100])
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 200)
    (tmp_path / "noise.bin").write_bytes(b"\xff" * 200)
    for name in ("cut.safetensors", "noise.safetensors", "noise.bin"):
        with pytest.raises(ValueError, match=f"{name}: .*(download the file again|use safetensors)"):
            tiny_pipeline.load_lora_weights(tmp_path / name)
    (tmp_path / "style.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"style.ckpt: unknown checkpoint format '\.ckpt'"):
        tiny_pipeline.load_lora_weights(tmp_path / "style.ckpt")
    torch.save(file, tmp_path / "style.bin")
    tiny_pipeline.load_lora_weights(tmp_path / "style.bin", adapter_name="style")
    tiny_pipeline.load_lora_weights(tmp_path, weight_name="style.bin", adapter_name="again")
    assert tiny_pipeline.get_list_adapters() == {"transformer": ["style", "again"]}
    save_file(file, tmp_path / "header.safetensors", {"lora_adapter_metadata": "{broken"})
    with pytest.raises(ValueError, match=r"header\.safetensors: unreadable or truncated"):
        tiny_pipeline.load_lora_weights(tmp_path / "header.safetensors")
    torch.save({"lora": file, "config": object}, tmp_path / "objects.bin")
    with pytest.raises(ValueError, match=r"objects.bin: holds more than plain tensors .*use safetensors"):
        tiny_pipeline.load_lora_weights(tmp_path / "objects.bin")


def test_a_stream_goes_on_only_with_the_adapters_it_was_saved_with(tiny_pipeline, tmp_path):
    """Scales and disabled adapters change the result: named with both values. Files without them still load."""
    pipe, path = tiny_pipeline, tmp_path / "stream.safetensors"
    pipe.load_lora_weights(as_file(random_lora(pipe.transformer), "diffusers"), adapter_name="style")
    pipe.load_lora_weights(differences(pipe.transformer, 0.1), adapter_name="light")
    pipe.set_adapters(["style", "light"], [1.0, 0.5])
    stream = pipe.stream(
        "a red circle", num_chunks=3, generator=torch.Generator().manual_seed(1), output_type="latent"
    )
    next(stream)
    stream.save_state(path)
    want = next(stream).latents
    changes = [
        (lambda: pipe.set_adapters(["style", "light"], [2.0, 0.5]), r"'style' at scale 1\.0, .* has it at scale 2\.0"),
        (lambda: pipe.set_adapters(["style", "light"], [1.0, 0.1]), r"'light' at scale 0\.5, .* has it at scale 0\.1"),
        (lambda: pipe.set_adapters("style"), r"'light' at scale 0\.5, .* has it not active"),
        (pipe.disable_lora, r"'light' at scale 0\.5, .* has it not active"),
        (lambda: pipe.transformer.blocks[0].attn1.to_q.set_scale("style", 3.0), r"'style'.* at scales \[1\.0, 3\.0\]"),
    ]
    for change, message in changes:
        change()
        with pytest.raises(ValueError, match=f"stream.safetensors was saved with adapter {message}"):
            pipe.restore_stream(path)
        pipe.enable_lora()
        pipe.set_adapters(["style", "light"], [1.0, 0.5])
    assert torch.equal(next(pipe.restore_stream(path)).latents, want)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["qarvd_stream"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del facts["adapters"]
    save_file(tensors, tmp_path / "older.safetensors", {"qarvd_stream": json.dumps(facts)})
    assert torch.equal(next(pipe.restore_stream(tmp_path / "older.safetensors")).latents, want)
