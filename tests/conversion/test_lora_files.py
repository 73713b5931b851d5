"""Reading LoRA files: every layout gives the same adapter, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch
from lora_files import LAYOUTS, as_file, random_lora

from qarvd_diffusers.conversion import check_fit, merge_lora, read_lora, to_peft


@pytest.fixture
def lora(tiny_pipeline):
    return random_lora(tiny_pipeline.transformer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_adapter(lora, layout):
    read = read_lora(as_file(lora, layout))
    assert read.keys() == lora.keys()
    for name, layer in lora.items():
        torch.testing.assert_close(read[name].delta(), layer.delta())


def test_top_level_modules_in_every_spelling():
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    for name in ("diffusion_model.text_embedding.0", "lora_unet_text_embedding_0", "transformer.condition_embedder.text_embedder.linear_1"):  # fmt: skip
        (module,) = read_lora({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b})
        assert module == "condition_embedder.text_embedder.linear_1"


def test_biases():
    """`diff_b` is added as it is; a bias of PEFT's B is scaled with it."""
    a, b, bias, alpha = torch.randn(2, 8), torch.randn(6, 2), torch.randn(6), torch.tensor(4.0)
    key = "diffusion_model.blocks.0.ffn.0"
    pair = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": alpha}
    (layer,) = read_lora({**pair, f"{key}.diff_b": bias}).values()
    assert torch.equal(layer.bias, bias)
    (scaled,) = read_lora({**pair, f"{key}.lora_B.bias": bias}).values()
    assert torch.equal(scaled.bias, bias * 2)
    tensors, config = to_peft(read_lora({**pair, f"{key}.diff_b": bias}), prefix="")
    assert torch.equal(tensors["blocks.0.ffn.net.0.proj.lora_B.bias"] * 2, bias) and config["lora_bias"]
    weight, old = torch.randn(6, 8), torch.randn(6)
    merged, moved = merge_lora(weight, old, layer, scale=0.5)
    torch.testing.assert_close(merged, weight + b @ a)
    torch.testing.assert_close(moved, old + 0.5 * bias)
    with pytest.raises(ValueError, match="adds a bias to a layer without one"):
        merge_lora(weight, None, layer)


def test_merging_keeps_the_dtype(lora):
    name, layer = next(iter(lora.items()))
    weight = torch.randn(layer.up.shape[0], layer.down.shape[1]).bfloat16()
    merged, _ = merge_lora(weight, None, layer)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (weight.float() + layer.delta()).bfloat16()), name


def test_zero_differences_of_norms_are_ignored_others_named(lora):
    file = as_file(lora, "comfyui")
    file["diffusion_model.blocks.0.norm3.diff"] = torch.zeros(24)
    assert read_lora(file).keys() == lora.keys()
    file["diffusion_model.blocks.0.norm3.diff"][3] = 1
    with pytest.raises(ValueError, match=r"norm3\.diff"):
        read_lora(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update({"diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(1, 2)}), "k_img.*image-to-video"),
        (lambda f: f.update({"diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight": torch.ones(2, 1)}), "another architecture"),
        (lambda f: f.update({"diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(1)}), "belongs to DoRA"),
        (lambda f: f.update({"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.ones(1)}), "belongs to LoKr"),
        (lambda f: f.pop("diffusion_model.blocks.1.ffn.2.lora_up.weight"), r"blocks.1.ffn.net.2 has \['alpha', 'down'\]"),
        (lambda f: f.update({"diffusion_model.blocks.1.ffn.2.lora_up.weight": torch.ones(24, 9)}), "different ranks"),
        (lambda f: f.update({"blocks.1.ffn.2.lora_B.weight": torch.ones(24, 3)}), "two tensors are the 'up' of blocks.1"),
        (lambda f: f.clear(), "holds no LoRA tensors"),
    ],
)  # fmt: skip
def test_what_is_no_lora_of_this_family_is_named(lora, change, message):
    file = as_file(lora, "comfyui")
    change(file)
    with pytest.raises(ValueError, match=f"my.safetensors.*{message}"):
        read_lora(file, "my.safetensors")


def test_fit(lora):
    sizes = {name: (layer.up.shape[0], layer.down.shape[1]) for name, layer in lora.items()}
    check_fit(lora, sizes)
    with pytest.raises(ValueError, match=r"adapts 1 layers that the model does not have.*the model has 2 blocks"):
        check_fit(lora, {name: size for name, size in sizes.items() if name != "blocks.0.attn1.to_q"})
    with pytest.raises(ValueError, match=r"blocks.0.attn1.to_q is \(24, 24\) here, \(48, 24\) in the model"):
        check_fit(lora, {**sizes, "blocks.0.attn1.to_q": (48, 24)})
