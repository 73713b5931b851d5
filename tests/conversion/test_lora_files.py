"""Reading LoRA files: every layout gives the same adapter, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch
from lora_files import LAYOUTS, as_file, original_name, random_lora

from qarvd_diffusers.conversion import check_fit, load_checkpoint, merge_lora, read_lora, to_peft


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
    for name in (
        "diffusion_model.text_embedding.0",
        "lora_unet_text_embedding_0",
        "transformer.condition_embedder.text_embedder.linear_1",
    ):
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
    (both,) = read_lora({**pair, f"{key}.lora_B.bias": bias, f"{key}.diff_b": bias}).values()
    assert torch.equal(both.bias, bias * 3)
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


def test_differences_are_read_by_their_parameter(lora):
    file = as_file(lora, "comfyui")
    extra = {
        "norm3.diff": ("blocks.0.norm2", "diff"),
        "norm3.diff_b": ("blocks.0.norm2", "bias"),
        "cross_attn.norm_q.diff": ("blocks.0.attn2.norm_q", "diff"),
        "diff_m": ("blocks.0.scale_shift_table", "diff"),
        "modulation.diff": ("blocks.0.scale_shift_table", "diff"),
    }
    for key, (module, kind) in extra.items():
        tensor = torch.randn(24)
        read = read_lora({**file, f"diffusion_model.blocks.0.{key}": tensor})
        assert read.keys() == {*lora, module} and getattr(read[module], kind) is tensor
    (alone,) = read_lora({"diffusion_model.blocks.0.ffn.2.diff_b": tensor}).values()
    assert alone.rank == 0 and alone.bias is tensor and alone.delta() is None


def test_a_difference_beside_a_pair_is_added_to_it():
    a, b, diff = torch.randn(2, 8), torch.randn(6, 2), torch.randn(6, 8)
    key = "diffusion_model.blocks.0.ffn.0"
    pair = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": torch.tensor(4.0)}
    (layer,) = read_lora({**pair, f"{key}.diff": diff}).values()
    torch.testing.assert_close(layer.delta(), 2 * b @ a + diff)
    tensors, config = to_peft({"blocks.0.ffn.net.0.proj": layer}, prefix="")
    product = tensors["blocks.0.ffn.net.0.proj.lora_B.weight"] @ tensors["blocks.0.ffn.net.0.proj.lora_A.weight"]
    torch.testing.assert_close(product * config["lora_alpha"] / config["r"], layer.delta())


@pytest.mark.parametrize("prefix", ["pipe.dit.", "dit.", "module.", "transformer.", "lora_unet__", "student.net."])
def test_prefixes(lora, prefix):
    kohya = prefix.endswith("_")
    file = {
        f"{prefix}{original_name(name).replace('.', '_') if kohya else original_name(name)}.lora_{part}.weight": tensor
        for name, layer in lora.items()
        for part, tensor in (("A", layer.down), ("B", layer.up * layer.scale))
    }
    read = read_lora(file)
    assert read.keys() == lora.keys()
    for name, layer in lora.items():
        torch.testing.assert_close(read[name].delta(), layer.delta())


def test_factors_of_convolutions():
    """`[r, k, 1, 1]` are factors of a Linear; those of the patch embedding are multiplied out."""
    a, b = torch.randn(2, 8, 1, 1), torch.randn(6, 2, 1, 1)
    (layer,) = read_lora({"blocks.0.ffn.0.lora_down.weight": a, "blocks.0.ffn.0.lora_up.weight": b}).values()
    torch.testing.assert_close(layer.delta(), b[:, :, 0, 0] @ a[:, :, 0, 0])
    a, b, weight = torch.randn(2, 4, 1, 2, 2), torch.randn(6, 2, 1, 1, 1), torch.randn(6, 4, 1, 2, 2)
    (layer,) = read_lora({"patch_embedding.lora_down.weight": a, "patch_embedding.lora_up.weight": b}).values()
    merged, _ = merge_lora(weight, None, layer)
    torch.testing.assert_close(merged, weight + torch.einsum("nrabc,rkdef->nkdef", b, a))


def test_what_is_left_out_is_counted_once(lora, caplog):
    file = as_file(lora, "comfyui")
    file["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(4, 64)
    file["text_encoder.block.0.q.lora_A.weight"] = torch.ones(4, 64)
    file["diffusion_model.blocks.0.norm_extra.diff"] = torch.full((4,), 1e-4)
    with caplog.at_level("WARNING"):
        assert read_lora(file, "my.safetensors").keys() == lora.keys()
    (record,) = caplog.records
    assert "my.safetensors: 3 tensors are left out: 2 of a text encoder" in record.getMessage()
    assert "norm_extra (diff)']), of size 0.0002" in record.getMessage()
    file["diffusion_model.blocks.0.norm_extra.diff"] += 10
    with pytest.raises(ValueError, match=r"my.safetensors: 1 tensors of size 20 .*norm_extra.*another kind of model"):
        read_lora(file, "my.safetensors")


def test_alphas_that_are_plain_numbers(lora, tmp_path):
    file = {key: value.item() if key.endswith(".alpha") else value for key, value in as_file(lora, "comfyui").items()}
    torch.save({**file, "rank": 3}, tmp_path / "style.pt")
    read = read_lora(load_checkpoint(tmp_path / "style.pt"))
    assert all(torch.equal(read[name].delta(), layer.delta()) for name, layer in lora.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(lora, bad):
    file = as_file(lora, "comfyui")
    file["diffusion_model.blocks.0.ffn.0.lora_up.weight"][3, 1] = bad
    with pytest.raises(ValueError, match=r"my\.pt: '.*ffn\.0\.lora_up\.weight' holds NaN or infinity"):
        read_lora(file, "my.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.update({"diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(1, 2)}),
            "k_img.*image-to-video",
        ),
        (
            lambda f: f.update({"diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight": torch.ones(2, 1)}),
            "double_blocks.*another kind of model",
        ),
        (
            lambda f: (f.clear(), f.update({"double_blocks.0.img_attn.qkv.lora_up.weight": torch.ones(2, 1)})),
            "another architecture",
        ),
        (lambda f: f.update({"diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(1)}), "belongs to DoRA"),
        (lambda f: f.update({"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.ones(1)}), "belongs to LoKr"),
        (
            lambda f: f.pop("diffusion_model.blocks.1.ffn.2.lora_up.weight"),
            r"blocks.1.ffn.net.2 has \['alpha', 'down'\]",
        ),
        (lambda f: f.update({"diffusion_model.blocks.1.ffn.2.lora_up.weight": torch.ones(24, 9)}), "different ranks"),
        (
            lambda f: f.update({"blocks.1.ffn.2.lora_B.weight": torch.ones(24, 3)}),
            "two tensors are the 'up' of blocks.1",
        ),
        (lambda f: f.clear(), "holds no LoRA tensors"),
    ],
)
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
