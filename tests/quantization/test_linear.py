"""QARVDLinear against the float layer it came from, and as a guest of torch, PEFT and the compiler."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from qarvd_diffusers.calibration.outliers import find_outliers
from qarvd_diffusers.calibration.weights import quantize_weight
from qarvd_diffusers.config import SCHEMES, QARVDConfig, QuantizedModule
from qarvd_diffusers.quantization import affine as P
from qarvd_diffusers.quantization.linear import PER_ROW, QARVDLinear
from qarvd_diffusers.quantization.packing import pack
from qarvd_diffusers.quantization.qparams import LinearQParams


def qparams_of(linear, scheme, x=None, alignment=8, **options):
    """Quantize one layer; the activation quantizer spans the range of x exactly."""
    config = QARVDConfig(scheme, **{"outlier_alignment": alignment, "outlier_detector": "mad_zscore", **options})
    outliers = find_outliers([linear.weight], config.outlier_detector, alignment, config.recipe)
    count = outliers.num_outliers
    quantizer = (None, None)
    if config.resolved_scheme.needs_calibration:
        x = torch.zeros(1, linear.in_features) if x is None else x.float().reshape(-1, linear.in_features)
        groups = x[:, outliers.channel_order.long()].tensor_split([count], dim=1)
        ends = [(g.min(), g.max()) if g.numel() else (x.new_zeros(()),) * 2 for g in groups]
        scale, zero_point = zip(*(P.affine_qparams(low, high, 8) for low, high in ends), strict=True)
        quantizer = (torch.stack(scale), torch.stack(zero_point).to(torch.int32))
    description = QuantizedModule(count, config.resolved_scheme.weight_bits, config.resolved_scheme.activation)
    codes, grid = quantize_weight(linear.weight, outliers, config)
    packed = (pack(codes, grid.bits), grid.scale, grid.zero_point.to(torch.int16))
    return LinearQParams(*packed, outliers.channel_order, *quantizer, description)


def pair(scheme, k=64, n=48, bias=True, outliers=4, dtype=torch.float32, **options):
    """A float layer with planted outlier columns, its quantized counterpart and an input."""
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias)
    x = torch.randn(3, 10, k)
    with torch.no_grad():
        linear.weight[:, :outliers] *= 20
    linear, x = linear.to(dtype).requires_grad_(False), x.to(dtype)
    return linear, QARVDLinear.from_float(linear, qparams_of(linear, scheme, x, **options)), x


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("outliers", (1, 2))
def test_groups_of_one_channel(scheme, outliers):
    """A single outlier has the error of several; torch's int8 product computes a single column wrongly on a CPU."""
    linear, layer, x = pair(scheme, n=32, outliers=outliers, alignment=1)
    assert layer.num_outliers == outliers
    want = linear(x)
    assert (layer(x) - want).norm() / want.norm() < (0.12 if "w4" in scheme else 0.012)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("outliers", (0, 4))
@pytest.mark.parametrize("bias", (True, False))
def test_close_to_the_float_layer(scheme, outliers, bias):
    linear, layer, x = pair(scheme, outliers=outliers, bias=bias)
    assert layer.num_outliers == (8 if outliers else 0)
    want, got = linear(x), layer(x)
    error = (got - want).norm() / want.norm()
    assert error < (0.12 if "w4" in scheme else 0.012)
    # what is left after removing the weight error is the activation's
    exact_weight = nn.functional.linear(x, layer.weight, layer.bias)
    assert (got - exact_weight).norm() / want.norm() < (1e-6 if scheme.endswith("a16") else 0.012)


def test_outlier_group_pays():
    _, plain, _ = pair("w4a8", outlier_detector="none")
    linear, dual, _ = pair("w4a8")
    assert dual.num_outliers == 8 and plain.num_outliers == 0
    normal = dual.channel_order[8:].long()
    errors = [(layer.weight - linear.weight)[:, normal].norm() for layer in (dual, plain)]
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16(scheme):
    linear, layer, x = pair(scheme, dtype=torch.bfloat16)
    got = layer(x)
    assert got.dtype == torch.bfloat16 and layer.weight.dtype == torch.bfloat16
    assert (got - linear(x)).float().norm() / linear(x).float().norm() < (0.12 if "w4" in scheme else 0.015)


@pytest.mark.parametrize("bits", (4, 8))
def test_reference_compat_equals_fake_quantization(bits):
    """Asymmetric weights and free zero-points: the integer path is the reference's float path, reordered."""
    linear, layer, x = pair(f"w{bits}a8", reference_compat=True)
    order, count = layer.channel_order.long(), layer.num_outliers
    permuted = x[..., order]
    total = linear.bias.double().expand(3, 10, -1)
    for g, part in enumerate((slice(0, count), slice(count, None))):
        a = P.fake_quantize(permuted[..., part], layer.input_scale[g], layer.input_zero_point[g], 8)
        total = total + a.double() @ layer.weight[:, order][:, part].double().T
    torch.testing.assert_close(layer(x).double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", (True, False))
def test_conversions_move_the_bias_and_nothing_else(bias):
    _, layer, x = pair("w8a8", bias=bias)
    before = {name: p.clone() for name, p in layer.named_parameters() if name != "bias"}
    for convert in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.float8_e4m3fn),
        lambda m: m.to("cpu", torch.bfloat16),
    ):
        convert(layer)
        for name, value in before.items():
            assert torch.equal(getattr(layer, name), value) and getattr(layer, name).dtype == value.dtype
    assert layer.dtype == layer.weight.dtype == torch.bfloat16
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_meta_construction_state_dict_and_deepcopy():
    _, layer, x = pair("w4a8")
    with pytest.warns(DeprecationWarning, match=r"call QARVDLinear\("):
        empty = QARVDLinear.empty(64, 48, True, layer.description, device="meta", dtype=torch.float32)
    assert all(p.is_meta and not p.requires_grad for p in empty.parameters())
    assert "weight" not in layer.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in layer.state_dict().items()
    }
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.weight_packed.data_ptr() != layer.weight_packed.data_ptr()
    assert empty.to_empty(device="meta").weight.shape == (48, 64)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("size", "limits"), [((192, 192), (0.56, 0.33)), ((1536, 1536), (0.51, 0.26)), ((1536, 8960), (0.51, 0.26))]
)
def test_stored_bytes(scheme, size, limits):
    spec = SCHEMES[scheme]
    description = QuantizedModule(0, spec.weight_bits, spec.activation)
    layer = QARVDLinear(*size, True, description, device="meta", dtype=torch.bfloat16)
    stored = sum(p.nbytes for p in layer.parameters())
    assert stored <= limits[spec.weight_bits == 4] * 2 * (size[0] * size[1] + size[1])


def test_frozen():
    _, layer, _ = pair("w8a8")
    with pytest.raises(ValueError, match=r"QARVDLinear is frozen.*LoRA"):
        layer.requires_grad_()
    assert layer.requires_grad_(False) is layer
    with pytest.raises(RuntimeError, match="no random initialization"):
        layer.reset_parameters()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_reaches_the_input(scheme):
    _, layer, x = pair(scheme)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lora(scheme):
    peft = pytest.importorskip("peft", reason="pip install -e '.[test]'")
    _, first, x = pair(scheme, k=32, n=32)
    _, second, _ = pair(scheme, k=32, n=32)
    x = x[..., :32]
    net = nn.Sequential(first, nn.SiLU(), second)
    want = net(x)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=True)
    net = peft.inject_adapter_in_model(config, net)
    torch.testing.assert_close(net(x), want)
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert len(trainable) == 4
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
    assert any(p.grad.any() for name, p in net.named_parameters() if name.startswith("0.") and p.requires_grad)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiles_as_one_graph(scheme):
    _, first, x = pair(scheme, k=32, n=32)
    _, second, _ = pair(scheme, k=32, n=32, bias=False)
    net = nn.Sequential(first, nn.SiLU(), second)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), net(x))
        torch.testing.assert_close(compiled(x[:1, :3]), net(x[:1, :3]))


def test_repr_names_the_scheme():
    _, layer, _ = pair("w4a8")
    assert "in_features=64, out_features=48, bias=True, weight_bits=4, activation=int8 static, num_outliers=8" in repr(
        layer
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.ones(48, 1)}, "weight_scale is torch.float32 (48, 1), expected torch.float32 (48, 2)"),
        ({"input_scale": None}, "input_scale is missing"),
        ({"channel_order": torch.arange(64)}, "channel_order is torch.int64 (64,), expected torch.int32"),
        ({"description": QuantizedModule(0, 8, "none")}, "['input_scale', 'input_zero_point'] have no place"),
        ({"weight_zero_point": torch.full((48, 2), -32000, dtype=torch.int16)}, "largest integer sum of this layer"),
    ],
)  # fmt: skip
def test_bad_qparams_are_named(change, message):
    linear = nn.Linear(64, 48)
    qparams = qparams_of(linear, "w8a8")
    given = {name: getattr(qparams, name) for name in qparams.__dataclass_fields__} | change
    if "zero_point" in message or "integer sum" in message:
        given["input_zero_point"] = torch.full((2,), -1000, dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape(message)):
        QARVDLinear.from_float(linear, LinearQParams(**given))


@pytest.fixture
def on_kernels(monkeypatch):
    """Take the path of compiled kernels; on a CPU their references run."""
    monkeypatch.setattr(QARVDLinear, "_kernels_run", staticmethod(lambda device: True))


@pytest.mark.parametrize("options", [{}, {"reference_compat": True}])
@pytest.mark.parametrize("outliers", (0, 4))
@pytest.mark.parametrize("bits", (4, 8))
def test_folded_layer_equals_the_stored_one(bits, outliers, options, monkeypatch):
    _, layer, x = pair(f"w{bits}a8", outliers=outliers, **options)
    want = layer(x)
    monkeypatch.setattr(QARVDLinear, "_kernels_run", staticmethod(lambda device: True))
    got = layer(x)
    # one rounding of the outlier sum: half a unit of the normal group
    unit = layer.input_scale[1] * layer.weight_scale[:, 1]
    assert got.shape == want.shape and bool(((got - want).abs() <= 0.51 * unit + 1e-5 * want.abs().max()).all())
    order = torch.randperm(48).to(torch.int32)
    layer.store_rows_in(order)
    torch.testing.assert_close(layer(x), got)
    torch.testing.assert_close(
        layer.bfloat16()(x.bfloat16()).float(), want, rtol=0.02, atol=0.02 * float(want.abs().max())
    )


def test_folded_constants_follow_the_state(on_kernels):
    _, layer, x = pair("w8a8")
    _, other, _ = pair("w8a8", bias=True)
    other.weight_scale.data *= 2
    layer(x)
    assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.uint8 for t in vars(layer._prepared).values())
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert "_prepared" not in "".join(layer.state_dict())
    assert torch.equal(copy.deepcopy(layer)(x), other(x))


@pytest.mark.parametrize("moved", [*PER_ROW, "all"])
def test_state_dict_follows_the_device_of_each_tensor(moved):
    """Rows lie in another order, and somebody has moved one parameter, or all but their order, elsewhere."""
    _, layer, _ = pair("w8a8", bias=True)
    want = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.store_rows_in(torch.randperm(48).to(torch.int32))
    names = [name for name, tensor in layer.named_parameters()] if moved == "all" else [moved]
    for name in names:
        setattr(layer, name, nn.Parameter(getattr(layer, name).to("meta"), requires_grad=False))
    got = layer.state_dict()
    assert [got[name].device.type for name in names] == ["meta"] * len(names)
    assert all(got[name].shape == tensor.shape for name, tensor in want.items())
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items() if name not in names)


def test_a_layer_whose_values_are_gone_can_be_loaded():
    _, layer, x = pair("w8a8", bias=True)
    want, state = layer(x), copy.deepcopy(layer.state_dict())
    layer.store_rows_in(torch.randperm(48).to(torch.int32))
    layer.to_empty(device="meta").load_state_dict(state, assign=True)
    assert torch.equal(layer.to("cpu")(x), want)


def test_folded_constants_follow_an_assigned_parameter(on_kernels):
    _, layer, x = pair("w8a8", bias=True)
    before = layer(x)
    layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)
    torch.testing.assert_close(layer(x), before + 1)


def test_rows_are_put_back_in_inference_mode_too():
    _, layer, _ = pair("w8a8", bias=True)
    layer.store_rows_in(torch.randperm(48).to(torch.int32))
    with torch.inference_mode():
        layer.state_dict()
    assert not any(parameter.is_inference() or parameter.data.is_inference() for parameter in layer.parameters())


class TestTheWeight:
    """`layer.weight`, which is computed when it is looked at."""

    @pytest.fixture
    def layer(self):
        return pair("w8a8")[1]

    def test_is_a_parameter_wherever_one_is_wanted(self, layer):
        plain, parameter = layer.dequantized(), nn.Parameter(layer.weight, requires_grad=False)
        assert isinstance(parameter, nn.Parameter) and torch.equal(parameter, plain)
        assert type(parameter.detach()) is type(layer.weight.detach()) is type(copy.copy(parameter)) is type(parameter)
        layer.weight_scale.data *= 2  # nothing was computed ahead of time
        assert torch.equal(parameter, 2 * plain)
        holder = nn.Module()
        holder.weight = parameter
        for moved in (holder.to(torch.bfloat16).weight, layer.weight.clone(), layer.weight.to("meta")):
            moved.zero_()  # ordinary tensors

    def test_copies_go_along_with_the_layer(self, layer):
        pairs = {"layer": layer, "weight": nn.Parameter(layer.weight, requires_grad=False)}
        twin = copy.deepcopy(pairs)
        twin["layer"].weight_scale.data *= 2
        assert isinstance(twin["weight"], nn.Parameter)
        assert torch.equal(twin["weight"], 2 * pairs["weight"])

    def test_is_never_written_to(self, layer):
        parameter, plain = nn.Parameter(layer.weight, requires_grad=False), layer.dequantized()
        for write in (
            lambda: parameter.copy_(plain),
            lambda: nn.init.zeros_(parameter),
            lambda: torch.add(plain, 1, out=layer.weight),
            lambda: torch._foreach_add_([layer.weight], 1),
            lambda: setattr(parameter, "data", plain),
        ):
            with pytest.raises(ValueError, match=r"packed integers: what is written to its .* would be lost"):
                write()
        with pytest.raises(ValueError, match=r"takes? no gradient\. Pass requires_grad=False"):
            nn.Parameter(layer.weight)
        with pytest.raises(TypeError, match=r"save the layer's state_dict\(\), or weight\.clone\(\)"):
            pickle.dumps(layer.weight)


def test_layer_that_could_overflow_stays_on_the_exact_operators(on_kernels):
    _, layer, x = pair("w8a8")
    layer.weight_scale.data[:, 0] *= 1e9
    want = layer._compute(x.double())
    assert layer(x).shape == want.shape and "largest integer sum" in layer._prepared
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_folded_layer_compiles_as_one_graph(on_kernels):
    _, layer, x = pair("w8a8")
    torch.compiler.reset()
    with torch.no_grad():
        want = layer(x)  # folds
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cuda_equals_cpu(scheme):
    """Odd sizes on purpose: the integer product of cuBLAS wants multiples of 8 and is padded."""
    _, layer, x = pair(scheme, k=70, n=46)
    want = layer(x)
    # the compiled kernels round the outlier sum once, to half a unit of the normal group
    unit = 0.0 if layer.input_scale is None else float(layer.input_scale[1] * layer.weight_scale[:, 1].max())
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), want, rtol=1e-4, atol=1e-4 + 0.51 * unit)


@pytest.mark.gpu
@pytest.mark.parametrize("here, there", [("cpu", "cuda"), ("cuda", "cpu")])
def test_rows_go_back_wherever_parameters_and_their_order_lie(here, there):
    _, layer, _ = pair("w8a8")
    want = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.store_rows_in(torch.randperm(48).to(torch.int32))
    layer.to(here)._row_order = layer._row_order.to(there)
    assert all(torch.equal(tensor.cpu(), want[name]) for name, tensor in layer.state_dict().items())
    layer.store_rows_in(torch.randperm(48).to(torch.int32))
    layer.weight_scale = nn.Parameter(layer.weight_scale.to(there), requires_grad=False)
    assert all(torch.equal(tensor.cpu(), want[name]) for name, tensor in layer.state_dict().items())
