"""Presets, detection, nested and sharded files, adapters that ship with a base, and the refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from lora_files import as_file, random_lora
from safetensors.torch import save_file

from qarvd_diffusers.conversion import convert as convert_module
from qarvd_diffusers.conversion import (
    convert_checkpoint,
    detect_checkpoint,
    families,
    folder_to_single_file,
    merge_lora,
    open_checkpoint,
    to_diffusers_keys,
    to_original_keys,
)
from qarvd_diffusers.conversion.families import FAMILIES, NETWORKS, available, find_family
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline

RUNS = {
    "self-forcing", "causal-forcing", "causal-forcing-framewise", "causal-forcing-framewise-2step",
    "causal-forcing-framewise-1step", "longlive", "longlive-2", "causvid", "krea", "infinity-rope", "reward-forcing",
    "lingbot-world", "lingbot-world-2", "lingbot-world-2-1.3b",
}  # fmt: skip


@pytest.fixture
def original(tiny_pipeline):
    return {key: value.detach() for key, value in to_original_keys(tiny_pipeline.transformer.state_dict()).items()}


def loaded(folder, **kwargs):
    pipe = ARVDPipeline.from_pretrained(folder, **kwargs)
    return pipe, dict(pipe.transformer.state_dict())


def test_presets_that_run_and_those_that_do_not():
    assert set(available()) == RUNS
    longlive = find_family("longlive").fields
    assert (longlive.local_attention_frames, longlive.sink_frames) == (12, 3)
    for family, preset in FAMILIES.items():
        if family not in available():
            with pytest.raises(
                ValueError, match=rf"family '{family}' is known but cannot run: it needs {preset.lacks[0]}"
            ):
                find_family(family)
    assert all(preset.network in NETWORKS for preset in FAMILIES.values())


@pytest.mark.parametrize(
    ("old", "new"), [("PRESETS", "FAMILIES"), ("Preset", "Family"), ("find_preset", "find_family")]
)
def test_names_of_version_0_1_still_work(old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} was renamed: use {new} instead"):
        assert getattr(families, old) is getattr(families, new)


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("self-forcing/checkpoints/self_forcing_dmd.pt", "self-forcing"),
        ("Causal-Forcing/chunkwise/causal_forcing.pt", "causal-forcing"),
        ("Causal-Forcing/framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("causal-forcing++/framewise-2step.pt", "causal-forcing-framewise-2step"),
        ("models/causal_forcing-framewise.safetensors", "causal-forcing-framewise"),
        ("self-forcing/longlive_base.pt", "longlive"),  # the file says more than a folder
        ("CausVid/autoregressive_checkpoint/model.pt", "causvid"),
        ("krea/krea-realtime-video-14b.safetensors", "krea"),
        ("LongLive-2.0-5B/model_bf16.pt", "longlive-2"),
    ],
)
def test_detection_by_name(original, tmp_path, path, family):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    (save_file if file.suffix == ".safetensors" else torch.save)(original, file)
    found = detect_checkpoint(file)
    assert found.family == family and any("in its path" in reason for reason in found.reasons)
    assert json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "rolling_forcing/model.safetensors",
            "family 'rolling-forcing' is known but cannot run.*noise levels jointly",
        ),
        ("chunkwise/longvideo.safetensors", "family 'causal-forcing-long' is known but cannot run.*levels jointly"),
        ("somewhere/model.safetensors", "the family cannot be determined.*Pass the family: self-forcing"),
    ],
)
def test_detection_refuses(original, tmp_path, path, message):
    (tmp_path / path).parent.mkdir(parents=True)
    save_file(original, tmp_path / path)
    with pytest.raises(ValueError, match=message):
        detect_checkpoint(tmp_path / path)


def test_a_network_of_another_size(tmp_path, monkeypatch):
    """Released sizes are told apart by their shapes; 14B shapes would need a large file, so a small one plays 14B."""
    from qarvd_diffusers.conversion import detect

    small = NETWORKS["1.3B"].__class__(24, 1, 4, "base")
    monkeypatch.setattr(detect, "NETWORKS", {**NETWORKS, "14B": small})
    tensors = {"patch_embedding.weight": torch.zeros(24, 4, 1, 2, 2), "blocks.0.modulation": torch.zeros(1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"is a 14B network, the family 'self-forcing' is 1\.3B"):
        detect_checkpoint(tmp_path / "a.safetensors", "self-forcing")
    # The only member of this size; but the bidirectional model has these tensors too.
    with pytest.raises(ValueError, match=r"the family cannot be determined.*Found: 14B\. Pass the family: krea"):
        detect_checkpoint(tmp_path / "a.safetensors")


def test_which_weights(original, tmp_path):
    ema = {key: value + 1 for key, value in original.items()}
    torch.save({"generator": original, "generator_ema": ema}, tmp_path / "both.pt")
    for family, chosen in (
        ("self-forcing", "generator_ema"),
        ("causal-forcing", "generator"),
        ("longlive", "generator"),
    ):
        found = detect_checkpoint(tmp_path / "both.pt", family)
        assert found.checkpoint.weights == chosen and set(found.checkpoint.found) == {"generator", "generator_ema"}
    assert (
        detect_checkpoint(tmp_path / "both.pt", "causal-forcing", "generator_ema").checkpoint.weights
        == "generator_ema"
    )
    torch.save({"generator": original}, tmp_path / "one.pt")
    assert detect_checkpoint(tmp_path / "one.pt", "self-forcing").checkpoint.weights == "generator"
    flat = {f"generator_ema.{key}": value for key, value in ema.items()}
    save_file(
        {**flat, **{f"generator.{key}": value for key, value in original.items()}}, tmp_path / "flat.safetensors"
    )
    assert open_checkpoint(tmp_path / "flat.safetensors").weights == "generator_ema"


@pytest.mark.parametrize("prefix", ["", "model.", "diffusion_model.", "model.diffusion_model."])
def test_prefixes(original, prefix):
    keys = {prefix + key.removeprefix("model."): value for key, value in original.items()}
    assert to_diffusers_keys(keys).keys() == to_diffusers_keys(original).keys()


def shards_of(original, folder, index=True):
    folder.mkdir()
    keys = sorted(original)
    parts = {f"model-{i + 1:05d}-of-00003.safetensors": keys[i::3] for i in range(3)}
    for name, part in parts.items():
        save_file({key: original[key] for key in part}, folder / name)
    if index:
        weight_map = {key: name for name, part in parts.items() for key in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards(tiny_pipeline, original, tmp_path, monkeypatch):
    source = shards_of(original, tmp_path / "shards")
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 20_000)
    out = convert_checkpoint(source, tmp_path / "out", num_attention_heads=2)
    assert len(list((out / "transformer").glob("*.safetensors"))) > 3
    _, tensors = loaded(out)
    want = tiny_pipeline.transformer.state_dict()
    assert tensors.keys() == want.keys() and all(torch.equal(tensors[key], want[key]) for key in want)


def test_faulty_shards(original, tmp_path):
    source = shards_of(original, tmp_path / "shards")
    second = source / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors: unreadable or truncated"):
        convert_checkpoint(source, tmp_path / "out")
    second.unlink()
    with pytest.raises(ValueError, match=r"lists \['model-00002-of-00003.safetensors'\], which are missing"):
        convert_checkpoint(source, tmp_path / "out")
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"lacks 'patch_embedding.weight': it is incomplete"):
        convert_checkpoint(source, tmp_path / "out", num_attention_heads=2)
    second.write_bytes(whole)
    (source / "model-00004.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match="shards of two models"):
        convert_checkpoint(source, tmp_path / "out")
    (source / "model-00004.safetensors").unlink()
    torch.save({"generator_ema": {"model.blocks.0.modulation": torch.zeros(1)}}, source / "model-00004.pt")
    with pytest.raises(ValueError, match=r"different weights .*model-00004.pt: generator_ema\); averaged"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dtype_spares_what_the_model_keeps_in_float32(original, tmp_path):
    save_file(original, tmp_path / "model.safetensors")
    out = convert_checkpoint(
        tmp_path / "model.safetensors", tmp_path / "out", num_attention_heads=2, dtype=torch.bfloat16
    )
    _, tensors = loaded(out, dtype=torch.bfloat16)
    assert tensors["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    table = "blocks.0.scale_shift_table"
    assert torch.equal(tensors[table], to_diffusers_keys(original)[table]) and tensors[table].dtype == torch.float32


def test_lora_that_ships_with_a_base(tiny_pipeline, original, tmp_path):
    lora = random_lora(tiny_pipeline.transformer)
    (tmp_path / "longlive").mkdir()
    source = tmp_path / "longlive" / "longlive_base.pt"
    torch.save({"generator": original}, source)
    with pytest.raises(ValueError, match="released as a base and a LoRA"):
        convert_checkpoint(source, tmp_path / "out", "auto", num_attention_heads=2)
    torch.save({"generator_lora": as_file(lora, "longlive")}, source.with_name("lora.pt"))
    out = convert_checkpoint(source, tmp_path / "out", "auto", num_attention_heads=2)
    pipe, tensors = loaded(out)
    assert pipe.rollout_config == FAMILIES["longlive"].fields
    plain = tiny_pipeline.transformer.state_dict()
    for name, layer in lora.items():
        want, _ = merge_lora(plain[f"{name}.weight"], None, layer)
        torch.testing.assert_close(tensors[f"{name}.weight"], want)
        assert torch.equal(tensors[f"{name}.bias"], plain[f"{name}.bias"])
    none = convert_checkpoint(source, tmp_path / "base", "longlive", lora="none", num_attention_heads=2)
    assert torch.equal(loaded(none)[1]["blocks.0.attn1.to_q.weight"], plain["blocks.0.attn1.to_q.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda lora: {"generator_ema_lora": lora}, "must not be mixed"),
        (lambda lora: {k.replace("blocks.1.", "blocks.7."): v for k, v in lora.items()}, "does not have"),
        (lambda lora: {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in lora.items()}, "another size"),
        (lambda lora: {k: v[:1] if "lora_A" in k else v for k, v in lora.items()}, "different ranks"),
    ],
)
def test_unfitting_loras_leave_nothing(tiny_pipeline, original, tmp_path, content, message):
    torch.save({"generator": original}, tmp_path / "base.pt")
    torch.save(content(as_file(random_lora(tiny_pipeline.transformer), "longlive")), tmp_path / "style.pt")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "base.pt", tmp_path / "out", lora=tmp_path / "style.pt", num_attention_heads=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pt", "style.pt"]


@pytest.mark.parametrize("member", ["causal_forcing_framewise", "causvid", "longlive", "krea_realtime", "longlive2"])
def test_golden_members_convert_both_ways(golden_family, tmp_path, member):
    """The members' own weights and names: into a folder and back, bit by bit."""
    golden = golden_family(member)
    family = {
        "causal_forcing_framewise": "causal-forcing-framewise",
        "krea_realtime": "krea",
        "longlive2": "longlive-2",
    }.get(member, member)
    stored = golden.state_dict()
    torch.save({"generator": stored}, tmp_path / "model.pt")
    heads = golden.original_config()["num_heads"]
    out = convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", family, lora="none", num_attention_heads=heads)
    pipe = ARVDPipeline.from_pretrained(out)
    assert pipe.rollout_config == FAMILIES[family].fields
    assert (pipe.config.height, pipe.config.fps) == ((704, 24) if family == "longlive-2" else (480, 16))
    folder_to_single_file(out, tmp_path / "back.safetensors", prefix="model.")
    back = open_checkpoint(tmp_path / "back.safetensors").shards[0].load()
    assert back.keys() == stored.keys() and all(torch.equal(back[key], stored[key]) for key in stored)


@pytest.mark.parametrize("family", available())
def test_windows_that_a_preset_cannot_hold(tiny_pipeline, family):
    """Named when the pipeline is made, and when a stream is asked for, before anything runs."""
    fields = FAMILIES[family].fields
    least = fields.sink_frames + fields.num_frames_per_chunk
    components = {**tiny_pipeline.components, "scheduler": None}
    small = {**fields.to_dict(), "local_attention_frames": least - 1}
    message = "local_attention_frames is .* at least sink_frames \\+ num_frames_per_chunk"
    with pytest.raises(ValueError, match=message):
        ARVDPipeline(**components, **small)
    pipe = ARVDPipeline(**components, **fields.to_dict(), height=32, width=48)
    pipe.window = least - 1
    with pytest.raises(ValueError, match=message):
        pipe.stream("a red circle")
    if fields.pin_shots or fields.context_mode == "rebuild":
        pipe.window = least + 1
        with pytest.raises(ValueError, match=r"pin_shots is True, .* two chunks|two or more whole chunks"):
            pipe.stream("a red circle")


MEASURE = """
import sys, torch
from qarvd_diffusers.conversion import convert_checkpoint
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
import threading, time
base, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
convert_checkpoint(sys.argv[1], sys.argv[2], num_attention_heads=4, dtype=torch.float16)
done.set(); thread.join()
print(peak - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc: run it on Linux")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A file of many blocks is converted (and cast) with little more memory than one of its tensors takes."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=128, ffn_dim=2048, num_layers=24, text_dim=64, freq_dim=64
    )
    state_dict = to_original_keys(model.state_dict())
    save_file(state_dict, tmp_path / "model.safetensors")
    total = sum(tensor.nbytes for tensor in state_dict.values())
    del model, state_dict
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model.safetensors"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 0.1 * total, (int(result.stdout), total)
