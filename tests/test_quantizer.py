"""A quantized transformer inside diffusers: load, save, offload, compile, adapters, and every refusal."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from safetensors.torch import load_file, save_file

import qarvd_diffusers  # noqa: F401  (registers the method)
from qarvd_diffusers.calibration.calibrate import quantize_weights
from qarvd_diffusers.config import QARVDConfig, QuantizedModule
from qarvd_diffusers.quantization.linear import QARVDLinear
from qarvd_diffusers.quantization.model import install_empty_modules, quantized_linears
from qarvd_diffusers.quantizer import attach, install

FILE = "diffusion_pytorch_model.safetensors"


def float_model(dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=2, text_dim=32, freq_dim=32
    )
    with tempfile.TemporaryDirectory() as folder:  # .to(dtype) would cast what the model keeps in float32
        model.save_pretrained(folder)
        return WanTransformer3DModel.from_pretrained(folder, dtype=dtype)


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 3, 4, 4, generator=generator).to(dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=generator).to(dtype),
    }


@torch.no_grad()
def output(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return model(**inputs(dtype), return_dict=False)[0]


def quantized_model(scheme: str = "w8a8_dynamic", dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    model, config = float_model(dtype), QARVDConfig(scheme)
    install(model, quantize_weights(model, config), config)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    quantized_model().save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w4a16", "w8a16"])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_reload_is_bit_identical(tmp_path, dtype, scheme, shard):
    model = quantized_model(scheme, dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    reloaded = WanTransformer3DModel.from_pretrained(tmp_path, dtype=dtype)
    state, expected = reloaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert torch.equal(output(reloaded, dtype), output(model, dtype))
    assert reloaded.config.quantization_config == model.config.quantization_config


def test_every_float_linear_of_the_blocks_is_gone(folder):
    model = WanTransformer3DModel.from_pretrained(folder)
    left = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not isinstance(module, QARVDLinear)
    ]
    assert left == [
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_2",
        "condition_embedder.time_proj",
        "proj_out",
    ]
    assert not [key for key in load_file(folder / FILE) if key.endswith("to_q.weight")]


def test_float_checkpoint_is_quantized_without_data_and_says_so(tmp_path, caplog):
    model = float_model()
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="qarvd_diffusers"):
        loaded = WanTransformer3DModel.from_pretrained(
            tmp_path, quantization_config=QARVDConfig("w8a8"), dtype=torch.float32
        )
    assert "w8a8_dynamic" in caplog.text
    assert torch.equal(output(loaded), output(quantized_model("w8a8_dynamic")))
    error = (output(loaded) - output(model)).norm() / output(model).norm()
    assert 0 < error < 0.02
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(
        output(WanTransformer3DModel.from_pretrained(tmp_path / "again", dtype=torch.float32)), output(loaded)
    )


def test_dict_config(tmp_path):
    float_model().save_pretrained(tmp_path)
    config = {"quant_method": "qarvd", "scheme": "w4a16"}
    model = WanTransformer3DModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    assert torch.equal(output(model), output(quantized_model("w4a16")))


def test_users_config_object_is_not_touched(tmp_path):
    float_model().save_pretrained(tmp_path)
    config = QARVDConfig("w8a16")
    WanTransformer3DModel.from_pretrained(tmp_path, quantization_config=config)
    assert config == QARVDConfig("w8a16")


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


Q = "blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.weight_scale"), rf"missing \({Q}\.weight_scale"),
        (lambda t: t.pop("proj_out.weight"), r"missing \(proj_out\.weight"),
        (lambda t: t.update({f"{Q}.extra": torch.ones(1)}), rf"unexpected \({Q}\.extra"),
        (lambda t: t.update({f"{Q}.weight_scale": torch.ones(3, 2)}), rf"{Q}\.weight_scale has shape \(3, 2\)"),
        (lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].half()}), rf"{Q}\.weight_scale is stored as"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as refusal:
        WanTransformer3DModel.from_pretrained(folder)
    assert FILE in str(refusal.value), "the message names the file"


def test_truncated_file(folder):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match=FILE):
        WanTransformer3DModel.from_pretrained(folder)


@pytest.mark.parametrize(("key", "value"), [("scheme", "w3a3"), ("rank", 7)])
def test_unknown_scheme_or_key_in_config(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=str(value) if key == "scheme" else key):
        WanTransformer3DModel.from_pretrained(folder)


def test_config_of_another_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"blocks\.1"):
        WanTransformer3DModel.from_pretrained(folder)


def test_disk_device_map_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="disk"):
        WanTransformer3DModel.from_pretrained(
            folder, device_map={"": "cpu", "blocks.1": "disk"}, offload_folder=str(tmp_path)
        )


def test_device_map_cpu(folder):
    assert torch.equal(
        output(WanTransformer3DModel.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.float32)),
        output(quantized_model()),
    )


def test_deepcopy():
    model = quantized_model()
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), output(model))
    twin.blocks[0].attn1.to_q.weight_scale.data.zero_()
    assert model.blocks[0].attn1.to_q.weight_scale.abs().max() > 0


def test_cast_keeps_codes_and_scales():
    model = quantized_model("w8a8_dynamic")
    before = {name: p.clone() for name, p in quantized_linears(model)[Q].named_parameters()}
    for child in model.children():  # ModelMixin.to refuses a dtype; parts of it are not guarded
        child.bfloat16()
    after = dict(quantized_linears(model)[Q].named_parameters())
    for name, tensor in before.items():
        if name != "bias":
            assert torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype, name


def test_layerwise_casting_leaves_quantized_layers_alone():
    model, expected = quantized_model(), output(quantized_model())
    apply_layerwise_casting(
        model,
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=torch.float32,
        skip_modules_pattern=("norm", "embed", "proj_out"),
    )
    error = (output(model) - expected).norm() / expected.norm()
    assert error < 0.02
    assert quantized_linears(model)[Q].weight_scale.dtype == torch.float32


@pytest.mark.parametrize("offload_buffers", (False, True))
def test_sequential_cpu_offload(offload_buffers):
    model, expected = quantized_model(), output(quantized_model())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    assert torch.equal(output(model), expected)
    assert quantized_linears(model)[Q].weight_packed.is_meta, "nothing packed stays behind"


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(kind):
    model, expected = quantized_model(), output(quantized_model())
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    assert torch.equal(output(model), expected)


def test_group_offload_to_disk(tmp_path):
    model, expected = quantized_model(), output(quantized_model())
    cpu = torch.device("cpu")
    apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    # What comes back from disk lies at other addresses, where float products round differently.
    assert torch.allclose(output(model), expected, atol=1e-6)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w4a16"])
def test_blocks_compile_without_graph_breaks(scheme):
    model = quantized_model(scheme)
    expected = output(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.allclose(output(model), expected, atol=1e-5)


def test_adapter_trains_on_top_and_is_not_saved(tmp_path):
    peft = pytest.importorskip("peft", reason="pip install -e '.[test]'")
    model = quantized_model()
    expected = output(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.equal(output(model), expected)
    model(**inputs(), return_dict=False)[0].sum().backward()
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert adapters and all(p.grad is not None for p in adapters)
    with pytest.raises(ValueError, match="adapter"):
        model.save_pretrained(tmp_path)
    model.unload_lora()
    assert torch.equal(output(model), expected)


def test_dequantize_gives_a_plain_model(tmp_path):
    model = quantized_model("w8a16")
    expected = output(model)
    model.dequantize()
    assert not quantized_linears(model)
    assert torch.allclose(output(model), expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.float32)), output(model))


def test_single_file_with_original_names(tmp_path, folder):
    """A float file in the original naming, quantized on the way in."""
    from qarvd_diffusers.conversion import to_original_keys

    save_file(to_original_keys(float_model().state_dict(), prefix=""), tmp_path / "wan.safetensors")
    float_model().save_pretrained(tmp_path / "config")
    model = WanTransformer3DModel.from_single_file(
        str(tmp_path / "wan.safetensors"),
        config=str(tmp_path / "config"),
        quantization_config=QARVDConfig("w8a16"),
        dtype=torch.float32,
    )
    assert torch.equal(output(model), output(quantized_model("w8a16")))


FIRST_LINEARS = {  # what `next(parameters())` and `ModelMixin.dtype` meet first: Linears with and without bias
    "CosmosTransformer3DModel": {"num_layers": 1},
    "Kandinsky5Transformer3DModel": {"num_text_blocks": 1, "num_visual_blocks": 1},
    "MiniMaxH3Transformer3DModel": {"num_layers": 1},
    "NucleusMoEImageTransformer2DModel": {"num_layers": 1},
    "SanaWMTransformer3DModel": {"num_layers": 1},
    "AnyFlowFARTransformer3DModel": {"num_layers": 1},
    "WanAnimate2Transformer3DModel": {"num_layers": 1},
}


@pytest.mark.parametrize("name", FIRST_LINEARS)
def test_dtype_of_a_quantized_model_is_that_of_the_float_model(name):
    with torch.device("meta"):
        model = getattr(diffusers, name)(**FIRST_LINEARS[name]).bfloat16()
    linears = {key: module for key, module in model.named_modules() if type(module) is torch.nn.Linear}
    biased = [key for key, module in linears.items() if module.bias is not None]
    install_empty_modules(model, dict.fromkeys(linears, QuantizedModule(0, 8, "static")))
    attach(model, QARVDConfig("w8a8"))
    assert model.dtype == torch.bfloat16
    assert all(next(model.get_submodule(key).parameters()).dtype == torch.bfloat16 for key in biased)
