"""Damaged files of saved streams: every mutation is a ValueError that names the file, before the first pass."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

KEY = "qarvd_stream"


def saved(pipe, path):
    """Save a stream after two of three chunks."""
    generator = torch.Generator().manual_seed(0)
    stream = pipe.stream("a red circle", num_chunks=3, generator=generator, output_type="pt", kv_cache="int8")
    next(stream), next(stream)
    stream.set_prompt("a blue square")
    stream.save_state(path)
    return next(stream).frames


def fact(*keys, value):
    """Set one fact of the header; `...` removes it."""

    def mutate(tensors, facts):
        for key in keys[:-1]:
            facts = facts[key]
        facts[keys[-1]] = value
        if value is ...:
            del facts[keys[-1]]

    return mutate


def tensor(name, change):
    """Replace a tensor; None removes it."""

    def mutate(tensors, facts):
        tensors[name] = change(tensors[name])
        if tensors[name] is None:
            del tensors[name]

    return mutate


def with_nan(values):
    values = values.clone()
    values.view(-1)[0] = torch.nan
    return values


MUTATIONS = {
    "no scale": (tensor("cache.0.key_scale", lambda old: None), r"cache: .*0\.key_scale"),
    "NaN scale": (tensor("cache.0.key_scale", with_nan), "cache.0.key_scale holds nan"),
    "negative scale": (tensor("cache.1.value_scale", torch.neg), "cache.1.value_scale holds -"),
    "keys of another dtype": (tensor("cache.0.key", torch.Tensor.float), r"0\.key is float32"),
    "unsigned keys": (tensor("cache.0.key", lambda old: old.view(torch.uint8)), r"0\.key is uint8"),
    "fewer keys": (tensor("cache.1.key", lambda old: old[:, 1:].contiguous()), r"1\.key"),
    "NaN in latents": (tensor("loop.recent.0", with_nan), "loop.recent.0 holds nan"),
    "integer latents": (tensor("loop.recent.0", torch.Tensor.int), "loop.recent.0 is int32"),
    "no latents": (tensor("loop.recent.1", lambda old: None), "loop.recent.1"),
    "unsigned text": (tensor("prompt_embeds", lambda old: old.view(torch.uint32)), "prompt_embeds"),
    "text of another width": (tensor("next_prompt.0", lambda old: old[..., 1:].contiguous()), "next_prompt.0"),
    "no next text": (tensor("next_prompt.0", lambda old: None), "next_prompt.0"),
    "no generator": (tensor("inputs.generator.0", lambda old: None), "inputs.generator.0"),
    "short generator": (tensor("inputs.generator.0", lambda old: old[1:].contiguous()), "inputs.generator"),
    "decoder memory missing": (tensor("decoder.0", lambda old: None), "decoder"),
    "decoder memory of another shape": (tensor("decoder.0", lambda old: old[:, 1:].contiguous()), r"decoder"),
    "version as text": (fact("version", value="2"), "is no stream saved by"),
    "no model": (fact("model", value=...), "missing keys 'model'"),
    "model as list": (fact("model", value=[]), "model is"),
    "adapters as number": (fact("adapters", value=3), "adapters is 3"),
    "fields as list": (fact("fields", value=[]), "fields is"),
    "a field of another type": (fact("fields", "num_frames_per_chunk", value="3"), "num_frames_per_chunk"),
    "another field": (fact("fields", "sink_frames", value=1), "causal fields differ"),
    "unknown output": (fact("output_type", value="gif"), "output_type is 'gif'"),
    "output as list": (fact("output_type", value=["pt"]), "output_type is"),
    "unknown storage": (fact("kv_cache", value="int3"), "kv_cache is 'int3'"),
    "unknown switch": (fact("next_prompts", 0, value="swap"), "next_prompts"),
    "switch too many": (fact("next_prompts", value=["keep"] * 2), "next_prompt.1"),
    "shape of three": (fact("inputs", "shape", value=[1, 4, 4]), "shape is"),
    "shape of texts": (fact("inputs", "shape", value=["1", 4, 4, 6]), "shape"),
    "huge shape": (fact("inputs", "shape", value=[1, 2**40, 2**40, 6]), "loop.recent.0"),
    "chunks as float": (fact("inputs", "num_chunks", value=3.0), "num_chunks is 3.0"),
    "no chunks": (fact("inputs", "num_chunks", value=0), "num_chunks 0"),
    "unknown device": (fact("inputs", "generator_device", value="toaster"), "inputs.generator of device 'toaster'"),
    "progress of the loop as bool": (fact("loop", "_next_chunk", value=True), "_next_chunk is True"),
    "progress after the end": (fact("loop", "_next_chunk", value=2**62), "_next_chunk is 4611686018427387904"),
    "negative progress": (fact("loop", "_next_chunk", value=-1), "_next_chunk is -1"),
    "steps that do not fit": (fact("loop", "_steps_done", value=1), "contradict each other"),
    "no frames": (fact("cache", "frames", value=...), "missing keys 'frames'"),
    "frames as number": (fact("cache", "frames", value=6), "frames is 6"),
    "frames out of order": (fact("cache", "frames", value=[0, 1, 2, 3, 5, 4]), "frames out of order"),
    "other frames": (fact("cache", "frames", value=[0, 1, 2, 3, 4]), "another last frame"),
    "huge frames of tokens": (fact("cache", "_tokens_per_frame", value=2**40), "large number"),
    "more tokens": (fact("cache", "_tokens_per_frame", value=20), "key"),
    "capacity of a text": (fact("cache", "_capacity", value="9"), "_capacity is '9'"),
    "small capacity": (fact("cache", "_capacity", value=1), "less capacity"),
    "origin as null": (fact("cache", "origin", value=None), "origin is None"),
}


def rewrite(source, target, mutate):
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()[KEY])
    mutate(tensors, facts)
    save_file(tensors, target, {KEY: json.dumps(facts)})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Hold the saved file; it is written by the first test, for which the pipeline is made."""
    return tmp_path_factory.mktemp("states") / "saved.safetensors"


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_damaged_state_is_refused_by_name(tiny_pipeline, files, tmp_path, name):
    if not files.is_file():
        saved(tiny_pipeline, files)
    mutate, message = MUTATIONS[name]
    path = tmp_path / "damaged.safetensors"
    rewrite(files, path, mutate)
    passes = []
    with pytest.raises(ValueError, match=message) as error:
        next(tiny_pipeline.restore_stream(path, on_pass=passes.append))
    assert "damaged.safetensors" in str(error.value)
    assert not passes


@pytest.mark.parametrize("text", ["null", "[]", "{", "[" * 100_000, '{"version": NaN}', '{"version": 2}'])
def test_damaged_facts_are_refused_by_name(tiny_pipeline, tmp_path, text):
    path = tmp_path / "damaged.safetensors"
    save_file({"prompt_embeds": torch.zeros(1, 2, 3)}, path, {KEY: text})
    with pytest.raises(ValueError, match=r"damaged\.safetensors"):
        tiny_pipeline.restore_stream(path)


@pytest.mark.parametrize("value", [2**63 - 1, None])
def test_a_very_long_stream_is_restored_at_once(tiny_pipeline, tmp_path, value):
    """The length changes neither the next chunk nor the memory that is allocated."""
    expected = saved(tiny_pipeline, tmp_path / "saved.safetensors")
    rewrite(tmp_path / "saved.safetensors", tmp_path / "long.safetensors", fact("inputs", "num_chunks", value=value))
    stream = tiny_pipeline.restore_stream(tmp_path / "long.safetensors")
    assert torch.equal(next(stream).frames, expected)
    stream.close()


def test_a_very_large_capacity_allocates_no_more(tiny_pipeline, tmp_path):
    expected = saved(tiny_pipeline, tmp_path / "saved.safetensors")
    rewrite(tmp_path / "saved.safetensors", tmp_path / "large.safetensors", fact("cache", "_capacity", value=2**62))
    assert torch.equal(next(tiny_pipeline.restore_stream(tmp_path / "large.safetensors")).frames, expected)
