"""From a float transformer to a quantized one: what is quantized, how good it is, and what is refused."""

import copy
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_wan import CHUNKS, make_run, make_wan
from torch import nn

from qarvd_diffusers.calibration.calibrate import calibrate, quantize_weights
from qarvd_diffusers.calibration.targets import input_groups, quantizable_linears, word_linears
from qarvd_diffusers.config import SCHEMES, QARVDConfig
from qarvd_diffusers.quantization.install import apply, dequantize
from qarvd_diffusers.quantization.linear import QARVDLinear
from qarvd_diffusers.quantization.result import CalibrationResult


@pytest.fixture
def wan():
    return make_wan()


def config_of(scheme="w8a8", **options):
    """A config with the scales of the paper; those of tokens: test_token_scales.py."""
    scales = {"static": "static", "dynamic": "dynamic", "none": "auto"}[SCHEMES[scheme].activation]
    paper = {"activation": scales, "weight_group": 0, "outlier_alignment": 4, "calibration_chunks": CHUNKS}
    return QARVDConfig(scheme, **{**paper, **options})


def forward(model, seed=3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        x, text = torch.randn(1, 4, 3, 4, 4, generator=g), torch.randn(1, 6, 24, generator=g)
        return model(x, torch.tensor([500.0]), text).sample


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


def same(a, b):
    return a.layers.keys() == b.layers.keys() and all(
        a.layers[name].description == b.layers[name].description
        and a.layers[name].tensors().keys() == b.layers[name].tensors().keys()
        and all(torch.equal(t, b.layers[name].tensors()[key]) for key, t in a.layers[name].tensors().items())
        for name in a.layers
    )


def test_targets(wan):
    names = list(quantizable_linears(wan, config_of()))
    block = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v"]
    block += ["attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    text = [f"condition_embedder.text_embedder.linear_{i}" for i in (1, 2)]
    assert sorted(names) == sorted(text + [f"blocks.{b}.{name}" for b in (0, 1) for name in block])
    some = quantizable_linears(wan, config_of(modules_to_not_convert=("text_embedder", "blocks.1", "ffn.net.2")))
    assert sorted(some) == sorted(f"blocks.0.{name}" for name in block[:-1])


def test_tied_inputs(wan):
    linears = quantizable_linears(wan, config_of())
    groups = input_groups(wan, linears, config_of())
    assert sorted(name for group in groups for name in group) == sorted(linears)
    tied = [group for group in groups if len(group) > 1]
    want = [[f"blocks.{b}.attn1.to_{c}" for c in "qkv"] for b in (0, 1)]
    want += [[f"blocks.{b}.attn2.to_{c}" for c in "kv"] for b in (0, 1)]
    assert sorted(map(list, tied)) == sorted(want)
    for options in ({"tie_inputs": False}, {"reference_compat": True}):
        assert all(len(group) == 1 for group in input_groups(wan, linears, config_of(**options)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quality_and_planted_outliers(wan, scheme):
    want, config = forward(wan), config_of(scheme, outlier_detector="mad_zscore")
    before = copy.deepcopy(wan.state_dict())
    result = calibrate(wan, make_run(wan, prompts=2), config)
    assert all(torch.equal(value, before[key]) for key, value in wan.state_dict().items())
    assert not any(module._forward_pre_hooks for module in wan.modules())
    for b in (0, 1):
        layer = result.layers[f"blocks.{b}.attn1.to_out.0"]
        assert layer.description.num_outliers == 4 and {0, 1} <= set(layer.channel_order[:4].tolist())
    apply(wan, result)
    quantized = [name for name, module in wan.named_modules() if isinstance(module, QARVDLinear)]
    assert quantized == list(result.layers)
    assert error(forward(wan), want) < (0.15 if "w4" in scheme else 0.02)


def test_splitting_by_inputs(wan):
    """The default of static 8 bits; one count for all blocks."""
    errors = {}
    with torch.no_grad():
        wan.blocks[0].ffn.net[0].proj.weight[:3] *= 8  # some inputs of the next layer extend further than others
        want = forward(wan)
    for detector in ("auto", "input", "mad_zscore", "none"):
        model = copy.deepcopy(wan)
        result = calibrate(model, make_run(model, prompts=3), config_of("w8a8", outlier_detector=detector))
        counts = [result.layers[f"blocks.{b}.ffn.net.2"].description.num_outliers for b in (0, 1)]
        assert counts[0] == counts[1] and counts[0] % 4 == 0
        apply(model, result)
        errors[detector] = error(forward(model), want)
    assert errors["auto"] == errors["input"] < 0.9 * errors["none"]
    assert errors["input"] < 1.2 * errors["mad_zscore"], "planted outliers are those of weights"


def test_layers_that_read_words_are_split_by_their_weights(wan):
    results = [
        calibrate(wan, make_run(wan), config_of("w8a8", outlier_detector=detector)).layers
        for detector in ("input", "mad_zscore")
    ]
    same = {name for name in results[0] if torch.equal(*(each[name].channel_order for each in results))}
    words = {f"blocks.{b}.attn2.{name}" for b in (0, 1) for name in ("to_k", "to_v", "to_out.0")}
    words |= {f"condition_embedder.text_embedder.linear_{i}" for i in (1, 2)}
    assert word_linears(wan, results[0]) == words <= same < set(results[0])


def test_the_detector_is_chosen_by_scheme():
    assert config_of("w8a8").resolved_outlier_detector == "input"
    for other in (
        config_of("w4a8"),
        config_of("w8a16"),
        config_of("w8a8_dynamic"),
        config_of("w8a8", reference_compat=True),
    ):
        assert other.resolved_outlier_detector == "mad_zscore"
    assert config_of("w8a8").resolved_input_percentiles == (1.0,)
    for clipped in (config_of("w4a8"), config_of("w8a8", reference_compat=True)):
        assert clipped.resolved_input_percentiles == config_of().percentiles
    with pytest.raises(
        ValueError, match="outlier_detector is 'input', expected another one: the scheme w8a16 has no static"
    ):
        config_of("w8a16", outlier_detector="input")


def test_tied_layers_share_channels_and_quantizer_but_no_memory(wan):
    apply(wan, calibrate(wan, make_run(wan), config_of()))
    q, k, v = (getattr(wan.blocks[0].attn1, f"to_{name}") for name in "qkv")
    for other in (k, v):
        for name in ("channel_order", "input_scale", "input_zero_point"):
            assert torch.equal(getattr(q, name), getattr(other, name))
            assert getattr(q, name).data_ptr() != getattr(other, name).data_ptr()
    free = calibrate(
        make_wan(), make_run(make_wan()), config_of(modules_to_not_convert=("text_embedder",), scheme="w8a16")
    )
    assert free.layers["blocks.0.attn1.to_q"].input_scale is None


def test_calibration_is_deterministic_and_weighted_by_chunk(wan):
    first, again = (calibrate(wan, make_run(wan), config_of(chunk_weights=(1.0, 1e-6, 1e-6))) for _ in range(2))
    assert same(first, again)
    first, last = (
        calibrate(wan, make_run(wan), config_of("w8a8", chunk_weights=weights, input_percentiles=(0.99, 0.999, 1.0)))
        for weights in ((1.0, 1e-6, 1e-6), (1e-6, 1e-6, 1.0))
    )
    assert not same(first, last), "chunk 0 is three times smaller than chunk 2: other values are worth clipping"


@pytest.mark.parametrize("scheme", ("w8a8", "w4a8"))
def test_reference_compat(wan, scheme):
    want = forward(wan)
    config = config_of(scheme, reference_compat=True, rounding_iterations=20)
    result = calibrate(wan, make_run(wan), config)
    assert result.layers["condition_embedder.text_embedder.linear_1"].description.num_outliers == 0
    apply(wan, result)
    assert error(forward(wan), want) < (0.15 if "w4" in scheme else 0.02)


def test_reference_watches_the_rounded_model_and_puts_it_back(wan):
    """The first layer of a block reads the output of rounded layers; afterwards the weights are the old ones."""
    before = copy.deepcopy(wan.state_dict())
    result = calibrate(wan, make_run(wan), config_of("w4a8", reference_compat=True, rounding="nearest"))
    assert all(torch.equal(value, before[key]) for key, value in wan.state_dict().items())
    for name, layer in result.layers.items():
        wan.get_submodule(name).weight.data = layer.weight(torch.float32)
    options = {"outlier_detector": "mad_zscore", "input_percentiles": config_of().percentiles}
    rounded = calibrate(wan, make_run(wan), config_of("w8a8", tie_inputs=False, chunk_weights="uniform", **options))
    name = "blocks.1.ffn.net.0.proj"
    torch.testing.assert_close(
        result.layers[name].input_scale[1], rounded.layers[name].input_scale[1], rtol=2e-3, atol=0
    )


def test_save_load_round_trip(wan, tmp_path):
    config = config_of("w4a8")
    result = calibrate(wan, make_run(wan), config)
    path = result.save(tmp_path / "new" / "result.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["result.safetensors"]
    loaded = CalibrationResult.load(path, config)
    assert same(result, loaded)
    assert "prompt" not in json.dumps(safe_open(path, "pt").metadata())
    with pytest.raises(ValueError, match="calibrated with another config"):
        CalibrationResult.load(path, config.replace(calibration_seed=1))
    other = make_wan()
    apply(wan, result)
    apply(other, loaded)
    assert torch.equal(forward(wan), forward(other))


def damage(change):
    def write(path):
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["qarvd"])
        tensors = load_file(path)
        change(tensors, metadata)
        save_file(tensors, path, {"qarvd": json.dumps(metadata)})

    return write


Q = "blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "bytes of tensors, its header lists"),
        (damage(lambda t, m: t.pop(f"{Q}.input_scale")), f"1 missing ({Q}.input_scale)"),
        (damage(lambda t, m: t.pop(f"{Q}.channel_order")), f"channel_order and weight_scale of {Q} are []"),
        (damage(lambda t, m: t.update(extra=torch.zeros(1))), "1 unexpected (extra)"),
        (
            damage(lambda t, m: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].half()})),
            f"{Q}.weight_scale is float16 [32, 2], expected float32 [32, 2]",
        ),
        (damage(lambda t, m: t.update({f"{Q}.input_scale": torch.ones(3)})), "is float32 [3], expected float32 [2]"),
        (damage(lambda t, m: t[f"{Q}.channel_order"].fill_(1)), f"{Q}.channel_order holds wrong values"),
        (damage(lambda t, m: t[f"{Q}.channel_order"].add_(1)), f"{Q}.channel_order holds wrong values"),
        (
            damage(lambda t, m: t[f"{Q}.weight_scale"].neg_()),
            f"{Q}.weight_scale holds wrong values, expected positive",
        ),
        (damage(lambda t, m: t[f"{Q}.input_scale"].fill_(float("nan"))), f"{Q}.input_scale holds wrong values"),
        (damage(lambda t, m: m["layers"][Q].update(num_outliers=True)), "num_outliers"),
        (damage(lambda t, m: m["layers"][Q].update(num_outliers=10**9)), "with K of at least 1000000000"),
        (damage(lambda t, m: m["layers"][Q].pop("weight_bits")), "weight_bits"),
        (damage(lambda t, m: m.update(layers=[])), "layers"),
        (damage(lambda t, m: m.update(format="other")), "has format 'other'"),
    ],
)
def test_damaged_files_are_refused(wan, tmp_path, write, message):
    path = calibrate(wan, make_run(wan), config_of()).save(tmp_path / "result.safetensors")
    write(path)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        CalibrationResult.load(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such calibration result"):
        CalibrationResult.load(tmp_path / "absent")


def test_a_failed_save_leaves_nothing(wan, tmp_path):
    result = quantize_weights(wan, config_of("w8a16"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        result.save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_dequantize_keeps_the_function(wan):
    apply(wan, quantize_weights(wan, config_of("w8a16")))
    want = forward(wan)
    dequantize(wan)
    assert not any(isinstance(module, QARVDLinear) for module in wan.modules())
    torch.testing.assert_close(forward(wan), want)


def test_blocks_share_one_compiled_graph():
    """Outliers differ from block to block, their count does not: torch would give up after eight different blocks."""
    wan = make_wan(planted=False, layers=10)
    with torch.no_grad():
        for i, block in enumerate(wan.blocks):
            block.ffn.net[0].proj.weight[:, i : 2 * i] *= 16
    result = quantize_weights(wan, config_of("w8a8_dynamic"))
    proj = [layer for name, layer in result.layers.items() if name.endswith("ffn.net.0.proj")]
    assert [layer.description.num_outliers for layer in proj] == [12] * 10
    assert all(set(range(i, 2 * i)) <= set(layer.channel_order[:12].tolist()) for i, layer in enumerate(proj))
    apply(wan, result)
    want = forward(wan)
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    wan.compile_repeated_blocks(fullgraph=True, backend=count)
    torch.testing.assert_close(forward(wan), want)
    assert len(graphs) == 1


def test_progress_counts_layers(wan):
    seen = []
    quantize_weights(wan, config_of("w8a16"), progress=lambda *step: seen.append(step))
    assert seen == [("quantizing weights", i + 1, 22) for i in range(22)]


def test_refusals(wan):
    with pytest.raises(ValueError, match=r"modules_to_not_convert names \['atn1'\]"):
        quantizable_linears(wan, config_of(modules_to_not_convert=("atn1",)))
    with pytest.raises(ValueError, match="has no Linear to quantize"):
        quantizable_linears(wan, config_of(modules_to_not_convert=("blocks", "condition_embedder")))
    with pytest.raises(ValueError, match="scheme w8a8 needs calibration data"):
        quantize_weights(wan, config_of())
    with pytest.raises(ValueError, match=r"0.proj has 7 input channels, an odd number.*modules_to_not_convert"):
        blocks = nn.Sequential(*(nn.ModuleDict({"proj": nn.Linear(7, 4)}) for _ in range(2)))
        quantize_weights(blocks, config_of("w4a16"))
    result = quantize_weights(wan, config_of("w8a16"))
    with pytest.raises(ValueError, match=r"blocks.1.* is a NoneType in this WanTransformer3DModel"):
        short = make_wan()
        short.blocks = short.blocks[:1]
        apply(short, result)
    assert not any(isinstance(module, QARVDLinear) for module in short.modules())
    apply(wan, result)
    with pytest.raises(ValueError, match=r"is a QARVDLinear .* applied already"):
        apply(wan, result)
    with pytest.raises(ValueError, match="22 layers are quantized already"):
        quantize_weights(wan, config_of("w8a16"))


def test_non_finite_weights_and_activations_are_named(wan):
    wan.blocks[1].ffn.net[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weight of blocks.1.ffn.net.2 holds NaN"):
        quantize_weights(wan, config_of("w8a16"))
    wan = make_wan()
    wan.blocks[0].norm2.bias.data[0] = torch.inf
    with pytest.raises(
        ValueError, match=r"input of blocks.0.attn2.to_q holds NaN or infinity in chunk 0, denoise pass"
    ):
        calibrate(wan, make_run(wan), config_of())
    assert not any(module._forward_pre_hooks for module in wan.modules())


def test_gaps_in_the_rollout_are_named(wan):
    with pytest.raises(ValueError, match=r"never reached chunks \[1, 2\], only \[0\]"):
        calibrate(wan, make_run(wan, chunks=1), config_of())
    with pytest.raises(RuntimeError, match="ran before any pass was announced"):
        calibrate(wan, make_run(wan, announce=False), config_of())
    with pytest.raises(ValueError, match="calibration ran no pass"):
        calibrate(wan, lambda on_pass: None, config_of())
