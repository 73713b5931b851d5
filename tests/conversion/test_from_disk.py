"""Quantizing from disk: the same bits as in memory, and memory that does not grow with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import HeliosTransformer3DModel, SkyReelsV2Transformer3DModel, WanTransformer3DModel

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.cli import main
from qarvd_diffusers.conversion import quantize_folder
from qarvd_diffusers.quantization.model import stored_bytes

OPTIONS = {"outlier_alignment": 4, "rounding": "nearest"}


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "float", max_shard_size="40KB")
    assert len(list((tmp_path / "float" / "transformer").glob("*.safetensors"))) > 2
    return tmp_path / "float"


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8_dynamic"])
def test_same_bits_as_in_memory(folder, tmp_path, scheme):
    config, seen = QARVDConfig(scheme, **OPTIONS), []
    sizes = quantize_folder(folder, tmp_path / "out", config, lambda *progress: seen.append(progress))
    pipe = ARVDPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    want = ARVDPipeline.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    assert pipe.quantization == want.quantization
    got, expected = pipe.transformer.state_dict(), want.transformer.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    assert sizes == stored_bytes(pipe.transformer)
    assert pipe.text_encoder is not None and "w" in (tmp_path / "out" / "README.md").read_text()
    assert seen[-1][1] == seen[-1][2] == len(pipe.quantization.modules)


@pytest.mark.parametrize("kind", (SkyReelsV2Transformer3DModel, HeliosTransformer3DModel))
def test_other_classes(kind, tmp_path, capsys):
    """Quantized by the class that the config names, listed, and loaded by stock diffusers with the same bits."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    model = kind(
        **sizes,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        **({"rope_dim": (4, 4, 4)} if kind is HeliosTransformer3DModel else {}),
    )
    model.save_pretrained(tmp_path / "float" / "transformer", max_shard_size="30KB")
    index = {"_class_name": "SomePipeline", "transformer": ["diffusers", kind.__name__]}
    (tmp_path / "float" / "model_index.json").write_text(json.dumps(index))
    config = QARVDConfig("w8a16", **OPTIONS)
    quantize_folder(tmp_path / "float", tmp_path / "out", config)
    got = kind.from_pretrained(tmp_path / "out" / "transformer").state_dict()
    want = kind.from_pretrained(tmp_path / "float" / "transformer", quantization_config=config).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[key], value) for key, value in want.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from diffusers import SomePipeline" in card and "ARVDPipeline" not in card
    for folder, bits in (("float", 16), ("out", 8)):
        assert main(["inspect", str(tmp_path / folder), "--json"]) == 0
        assert {layer["weight_bits"] for layer in json.loads(capsys.readouterr().out)["layers"]} == {bits}
    path = tmp_path / "float" / "transformer" / "config.json"
    path.write_text(path.read_text().replace(kind.__name__, "MyTransformer"))
    with pytest.raises(ValueError, match="describes a MyTransformer, which is not a model class of diffusers"):
        quantize_folder(tmp_path / "float", tmp_path / "other", config)


def test_refusals(folder, tmp_path):
    with pytest.raises(ValueError, match="has to run the model and cannot work from disk"):
        quantize_folder(folder, tmp_path / "out", QARVDConfig("w8a8"))
    with pytest.raises(ValueError, match="rounding 'gptq' has to run the model"):
        quantize_folder(folder, tmp_path / "out", QARVDConfig("w4a16"))
    (tmp_path / "exists").mkdir()
    with pytest.raises(FileExistsError):
        quantize_folder(folder, tmp_path / "exists", QARVDConfig("w8a16"))
    quantize_folder(folder, tmp_path / "out", QARVDConfig("w8a16", **OPTIONS))
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_folder(tmp_path / "out", tmp_path / "twice", QARVDConfig("w8a16"))
    next((folder / "transformer").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="which are missing"):
        quantize_folder(folder, tmp_path / "less", QARVDConfig("w8a16"))
    assert not (tmp_path / "less").exists()


def test_command_line(folder, tmp_path, capsys):
    command = ["quantize", str(folder), str(tmp_path / "out"), "--scheme", "w8a16", "--from-disk", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["sizes"]["quantized"] > 0
    assert ARVDPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32).quantization.scheme == "w8a16"


MEASURE = """
import sys, threading, time, torch
torch.set_num_threads(1)
import diffusers
from qarvd_diffusers import QARVDConfig
from qarvd_diffusers.conversion import quantize_folder
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
quantize_folder(sys.argv[3], sys.argv[4], QARVDConfig("w8a16"))  # a small model, so that imports are not counted
base, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
quantize_folder(sys.argv[1], sys.argv[2], QARVDConfig("w8a16"))
done.set(); thread.join()
print(peak - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc: run it on Linux")
def test_memory_is_bounded_by_a_shard_and_a_block(folder, tmp_path):
    """1.2 times the largest shard and one block, while the model is many times that."""
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=128, ffn_dim=2048, num_layers=32, text_dim=64, freq_dim=64
    ).bfloat16()
    large = tmp_path / "large"
    model.save_pretrained(large / "transformer", max_shard_size="50MB")
    (large / "model_index.json").write_text("{}")
    block = sum(parameter.nbytes for parameter in model.blocks[0].parameters())
    total = sum(parameter.nbytes for parameter in model.parameters())
    shard = max(path.stat().st_size for path in (large / "transformer").glob("*.safetensors"))
    del model
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (large, tmp_path / "out", folder, tmp_path / "small"))],
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"},  # freed means given back
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout)
    print(f"peak {peak / 1e6:.0f} MB, block {block / 1e6:.0f}, shard {shard / 1e6:.0f}, model {total / 1e6:.0f}")
    assert peak < 1.2 * shard + block < 0.6 * total
