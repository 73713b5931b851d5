"""A folder whose weight files do not hold the whole model is refused by file and tensor, whatever the component."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.pipelines.stored_components import check_components

FILES = {
    "transformer": ("diffusion_pytorch_model.safetensors", "blocks.0.attn1.to_q.weight"),
    "vae": ("diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
    "text_encoder": ("model.safetensors", "encoder.block.0.layer.0.SelfAttention.q.weight"),
}
CHANGES = {
    "missing": (lambda t, name: t.pop(name), r"1 tensors of \w+ are missing \({name}\)"),
    "renamed": (lambda t, name: t.update({name + "s": t.pop(name)}), r"1 tensors of \w+ are missing \({name}\)"),
    "integers": (lambda t, name: t.update({name: t[name].int()}), r"{name} is int32 .*, expected float"),
}


def change(path, do):
    tensors = load_file(path)
    do(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("component", FILES)
def test_a_file_that_lacks_a_tensor_is_refused(component, what, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    file, name = FILES[component]
    do, message = CHANGES[what]
    change(tmp_path / component / file, lambda tensors: do(tensors, name))
    with pytest.raises(ValueError, match=message.format(name=name)) as caught:
        ARVDPipeline.from_pretrained(tmp_path)
    assert str(tmp_path / component / file) in str(caught.value)


def test_a_quantized_file_beside_a_float_config_is_refused(tiny_pipeline, tmp_path):
    tiny_pipeline.quantize(QARVDConfig("w8a8_dynamic"))
    tiny_pipeline.save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "quantization_config"})
    )
    with pytest.raises(ValueError, match=r"holds a quantized model, .*lacks its quantization_config"):
        ARVDPipeline.from_pretrained(tmp_path)


def test_shards_variants_casts_and_surplus_tensors_load(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny_pipeline.save_pretrained(tmp_path / "variant", variant="fp16")
    change(tmp_path / "variant" / "text_encoder" / "model.fp16.safetensors", lambda t: t.update(extra=torch.zeros(1)))
    for folder, options in (("shards", {"dtype": torch.bfloat16}), ("variant", {"variant": "fp16"})):
        loaded = ARVDPipeline.from_pretrained(tmp_path / folder, **options)
        check_components(loaded.components, options.get("variant"))
    (index,) = (tmp_path / "shards" / "transformer").glob("*.index.json")
    listed = json.loads(index.read_text())
    first, *_, last = listed["weight_map"]
    listed["weight_map"][first] = listed["weight_map"][last]
    index.write_text(json.dumps(listed))
    with pytest.raises((ValueError, OSError), match=r"index\.json|Unable to load weights"):
        ARVDPipeline.from_pretrained(tmp_path / "shards")
