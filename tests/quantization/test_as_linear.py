"""1x1 convolutions and stacked experts compute, are stored and are undone as the Linears that they are."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from qarvd_diffusers import QARVDConfig, quantize, quantized_linears, stored_bytes
from qarvd_diffusers.calibration.calibrate import quantize_weights
from qarvd_diffusers.calibration.targets import ROUTER, kept_float
from qarvd_diffusers.quantization.as_linear import as_linear, experts_of
from qarvd_diffusers.quantization.convolution import CONVOLUTIONS
from qarvd_diffusers.quantization.experts import QARVDExperts
from qarvd_diffusers.quantization.install import apply
from qarvd_diffusers.quantization.linear import QARVDLinear
from qarvd_diffusers.quantizer import install

SCHEMES = ("w8a8_dynamic", "w4a8_dynamic", "w8a16", "w4a16")
FILE = "diffusion_pytorch_model.safetensors"


class Experts(nn.Module):
    """Experts as models have them: `[E, K, N]` with matmul or a grouped product, `[E, N, K]` with linear."""

    def __init__(self, width: int, hidden: int, experts: int, layout: str) -> None:
        super().__init__()
        up, down = (experts, width, hidden), (experts, hidden, width)
        if layout == "linear":
            up, down = down, up
        self.layout = layout
        self.up = nn.Parameter(torch.randn(up) / 8)
        self.down = nn.Parameter(torch.randn(down) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = len(x) // len(self.up)
        if self.layout == "grouped":
            ends = torch.arange(1, len(self.up) + 1, dtype=torch.int32) * each
            return F.grouped_mm(F.silu(F.grouped_mm(x, self.up, offs=ends)), self.down, offs=ends)
        product = F.linear if self.layout == "linear" else torch.matmul
        parts = [product(F.silu(product(part, self.up[i])), self.down[i]) for i, part in enumerate(x.split(each))]
        return torch.cat(parts)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, experts: int, layout: str) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.conv = nn.Conv2d(width, width, 1)
        self.experts = Experts(width, hidden, experts, layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.conv(x)
        rows = x.movedim(1, -1).flatten(0, -2)
        mixed = self.experts(rows) * self.gate(rows).sigmoid().mean(1, keepdim=True)  # fixed experts: no jumps
        return x + mixed.view(len(x), *x.shape[2:], -1).movedim(-1, 1)


class Model(ModelMixin, ConfigMixin, PeftAdapterMixin):
    @register_to_config
    def __init__(self, width: int = 64, hidden: int = 96, experts: int = 4, layout: str = "matmul") -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, hidden, experts, layout) for _ in range(2)])

    def forward(self, x: torch.Tensor, timestep: float = 1.0) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def float_model(layout: str = "matmul") -> Model:
    torch.manual_seed(0)
    return Model(layout=layout).eval()


def picture(seed: int = 0, size: int = 4) -> torch.Tensor:
    return torch.randn(2, 64, size, size, generator=torch.Generator().manual_seed(seed))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_computes_what_the_linear_over_its_channels_does(kind, scheme):
    """Bit for bit, which a layer that ignores its weights, or mixes up its axes, would not."""
    torch.manual_seed(0)
    convolution, dimensions = kind(64, 48, 1), list(CONVOLUTIONS).index(kind) + 1
    linear = nn.Linear(64, 48)
    linear.weight, linear.bias = nn.Parameter(convolution.weight.flatten(1)), convolution.bias
    done = []
    for layer in (convolution, linear):
        model = nn.ModuleList([nn.ModuleList([layer, copy.deepcopy(layer)])])
        apply(model, quantize_weights(model, QARVDConfig(scheme)))
        done.append(model[0][0])
    x = torch.randn(2, 64, *(3, 4, 5)[:dimensions])
    with torch.no_grad():
        assert torch.equal(done[0](x), done[1](x.movedim(1, -1)).movedim(-1, 1))
        assert torch.equal(done[0](x[0]), done[0](x)[0])
        assert 1e-4 < error(done[0](x), convolution(x)) < (0.02 if "8" in scheme[:2] else 0.15)
        assert done[0](x).is_contiguous()
    assert isinstance(done[0], kind) and done[0].weight.shape == convolution.weight.shape
    assert type(done[0].to_float()) is kind and torch.equal(done[0].to_float().weight, done[0].dequantized())


def test_only_convolutions_of_one_input_an_output_are_linears():
    assert as_linear(nn.Conv2d(8, 8, 1, padding="same")) is not None
    for other in ({"kernel_size": 3}, {"stride": 2}, {"padding": 1}, {"groups": 2}):
        assert as_linear(nn.Conv2d(8, 8, **{"kernel_size": 1, **other})) is None


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", ["matmul", "grouped", "linear"])
def test_experts_compute_what_their_linears_do(layout, scheme):
    """Each expert by itself, against the quantized Linear of the same weight, bit for bit."""
    model = float_model(layout)
    weights = {i: model.blocks[0].experts.up[i] for i in range(4)}
    install(model, quantize_weights(model, QARVDConfig(scheme)), QARVDConfig(scheme))
    stack = model.blocks[0].experts.up
    assert isinstance(stack, QARVDExperts) and len(stack) == 4
    x = torch.randn(12, 64)
    with torch.no_grad():
        for i, layer in enumerate(quantized_linears(stack).values()):
            weight = weights[i] if layout == "linear" else weights[i].T
            got = F.linear(x, stack[i]) if layout == "linear" else x @ stack[i]
            assert torch.equal(got, layer(x)) and 1e-4 < error(got, x @ weight.T) < (0.02 if "w8" in scheme else 0.15)
        if layout != "linear":
            ends = torch.tensor([3, 3, 7, 12], dtype=torch.int32)  # the second one gets nothing
            parts = [x[a:b] @ stack[i] for i, (a, b) in enumerate([(0, 3), (3, 3), (3, 7), (7, 12)])]
            assert torch.equal(F.grouped_mm(x, stack, offs=ends), torch.cat(parts))
        assert torch.equal(torch.einsum("...,...->...", stack, torch.ones(())), stack.to_float())  # anything else
    assert stack.shape == stack.to_float().shape


@pytest.mark.parametrize("layout", ["matmul", "grouped", "linear"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16"])
def test_calibrated_and_reloaded_bit_for_bit(layout, scheme, tmp_path):
    model = float_model(layout)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(picture(9))

    def rollout(seed):
        return [model(picture(seed), timestep=t) for t in (1000.0, 500.0)]

    report = quantize(model, [lambda i=i: rollout(i) for i in range(4)], QARVDConfig(scheme))
    assert report.parameters["quantized"] == sum(t.numel() for n, t in before.items() if "gate" not in n)
    assert report.kept == {f"blocks.{i}.gate": ROUTER for i in range(2)}
    assert report.bytes["after"] == sum(p.nbytes for p in model.parameters()) == stored_bytes(model)["total"]
    convolutions = {layer.activation for name, layer in report.layers.items() if name.endswith("conv")}
    assert convolutions == {"none" if scheme == "w4a16" else "token"}
    experts = {layer.activation for name, layer in report.layers.items() if "experts" in name}
    assert experts == {"none" if scheme == "w4a16" else "token"}
    output = model(picture(9))
    assert 1e-4 < error(output, expected) < (0.03 if scheme == "w8a8" else 0.2)
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(picture(9)), output)
    again.dequantize()
    assert {name: t.shape for name, t in again.state_dict().items()} == {n: t.shape for n, t in before.items()}
    assert error(again(picture(9)), output) < 0.05


def test_rounding_from_data_beats_nearest_for_experts():
    """Where every expert reads more tokens than it has channels: 512 for 64 and 96."""
    errors = []
    for rounding in ("nearest", "gptq"):
        model = float_model()
        expected = model(picture(9))
        rollouts = [lambda i=i, m=model: m(picture(i, size=8), timestep=1000.0) for i in range(16)]
        config = QARVDConfig("w4a16", rounding=rounding, modules_to_not_convert=("conv",))
        quantize(model, rollouts, config)
        errors.append(error(model(picture(9)), expected))
    assert errors[1] < 0.9 * errors[0]


def test_checkpoints_with_them_have_another_format_and_others_do_not(tmp_path):
    formats = []
    for kept in ((), ("conv", "experts")):
        model = float_model()
        options = {"modules_to_not_convert": kept, "modules_to_convert": ("gate",), "activation": "dynamic"}
        config = QARVDConfig("w8a8_dynamic", **options)
        install(model, quantize_weights(model, config), config)
        model.save_pretrained(tmp_path / str(len(kept)))
        stored = json.loads((tmp_path / str(len(kept)) / "config.json").read_text())
        formats.append(stored["quantization_config"]["format"])
    assert formats == [3, 2]


def test_damage_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    model, config = float_model(), QARVDConfig("w8a8_dynamic")
    install(model, quantize_weights(model, config), config)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors["blocks.1.experts.down.2.weight_scale"][0] = -1
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"blocks\.1\.experts\.down\.2\.weight_scale holds wrong values"):
        Model.from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["quantization_config"]["modules"]["blocks.1.experts.down.2"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"config.json .* not blocks\.1\.experts\.down\.2"):
        Model.from_pretrained(tmp_path)


def test_experts_are_told_by_their_router():
    names = [f"blocks.{i}.experts.{leaf}" for i in range(2) for leaf in ("up", "down")]
    assert list(experts_of(float_model())) == names
    plain = nn.Module()
    plain.table = nn.Parameter(torch.zeros(4, 6, 8))
    assert not experts_of(plain)
    assert "blocks.0.experts.up.3" in kept_float(float_model(), QARVDConfig(modules_to_not_convert=("up",)))


def test_adapters_offloading_and_casting(tmp_path):
    peft = pytest.importorskip("peft", reason="pip install -e '.[test]'")
    model, config = float_model(), QARVDConfig("w8a8_dynamic")
    install(model, quantize_weights(model, config), config)
    with torch.no_grad():
        expected = model(picture())
        twin = copy.deepcopy(model)
        twin.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
        assert torch.equal(twin(picture()), expected)
        for name in ("conv", "experts.up.1"):
            layers = [f"blocks.0.{name}"]
            model.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False), "some")
            assert not torch.equal(model(picture()), expected), name
            model.delete_adapters("some")
            assert torch.equal(model(picture()), expected), name
        model.unload_lora()
    scales = model.blocks[0].conv.weight_scale.clone()
    model.blocks.bfloat16()
    assert torch.equal(model.blocks[0].conv.weight_scale, scales) and model.blocks[0].conv.bias.dtype == torch.bfloat16
    x = picture().requires_grad_()
    float_model_of = model.blocks[0].conv.to_float().float()
    model.blocks.float()
    model.blocks[0].conv(x).sum().backward()
    got, x.grad = x.grad, None
    float_model_of(x).sum().backward()
    assert error(got, x.grad) < 0.01
    assert all(isinstance(layer, QARVDLinear) for layer in quantized_linears(model).values())


@pytest.mark.parametrize("layout", ["matmul", "linear"])
def test_from_disk_gives_the_bits_of_loading(layout, tmp_path):
    from qarvd_diffusers.conversion.from_disk import _FromDisk

    model, config = float_model(layout), QARVDConfig("w4a16", rounding="nearest")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    from qarvd_diffusers.files.safetensors import TensorSpec

    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    work = _FromDisk(model.to("meta"), specs, tensors.__getitem__, config, None)
    read = {key: work(key) for shard in work.shards() for key in shard}
    whole = float_model(layout)
    install(whole, quantize_weights(whole, config), config)
    state = whole.state_dict()
    assert read.keys() == state.keys() and work.format == 3
    assert all(torch.equal(read[key], tensor) for key, tensor in state.items())
    assert work.sizes() == stored_bytes(whole)
