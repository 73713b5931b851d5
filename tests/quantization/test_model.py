from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from qarvd_diffusers.calibration.calibrate import quantizable_linears
from qarvd_diffusers.config import QARVDConfig, QuantizedModule
from qarvd_diffusers.files.atomic import atomic_directory, atomic_file
from qarvd_diffusers.quantization.model import check_keys, describe_modules, install_empty_modules, stored_bytes


def test_atomic_directory_appears_whole(tmp_path):
    target = tmp_path / "a" / "model"
    with atomic_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    assert sorted(p.name for p in target.parent.iterdir()) == ["model"]


def test_atomic_directory_vanishes_on_error(tmp_path):
    with pytest.raises(RuntimeError, match="full"), atomic_directory(tmp_path / "model") as folder:
        (folder / "x").write_text("1")
        raise RuntimeError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_keeps_other_files(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "config.json").write_text("old")
    with atomic_directory(target) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "config.json").read_text() == "new"


def test_atomic_file(tmp_path):
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "x.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_file(tmp_path / "x.json") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "x.json").read_text() == "whole"


def test_check_keys_names_missing_and_unexpected():
    model = torch.nn.Linear(2, 2)
    check_keys(model, ["weight", "bias"], "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors .* 1 missing \(bias\) and 1 unexpected \(weihgt\)"):
        check_keys(model, ["weihgt", "weight"], "x.safetensors")


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.51), (4, 0.26)])
def test_bytes_at_the_1_3b_shape(bits, bound):
    """Scales, zero-points, channel order and bias included, against bfloat16 weight and bias."""
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=2)
    names = quantizable_linears(model, QARVDConfig())
    modules = {name: QuantizedModule(128, bits, "static") for name in names}
    install_empty_modules(model, modules)
    assert describe_modules(model) == modules
    sizes = stored_bytes(model)
    assert sizes["quantized"] <= bound * sizes["bfloat16"]
    expected = sum(2 * (module.in_features + 1) * module.out_features for module in names.values())
    assert sizes["bfloat16"] == expected


def test_unknown_module_name_is_refused():
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=24, ffn_dim=48, num_layers=1, text_dim=16
        )
    with pytest.raises(ValueError, match=r"blocks\.7\.attn1\.to_q"):
        install_empty_modules(model, {"blocks.7.attn1.to_q": QuantizedModule(0, 8, "static")})
