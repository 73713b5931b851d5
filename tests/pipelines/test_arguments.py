"""What callers write: aliases mean the same everywhere; errors name arguments of other pipelines and misspellings."""

from __future__ import annotations

import pytest
import torch

from qarvd_diffusers import ARVDPipeline, QARVDConfig

PROMPT = "a red circle moves left"
FP32, BF16 = torch.float32, torch.bfloat16


def latents_of(pipe, prompt=PROMPT, **kwargs):
    kwargs = {"num_chunks": 1, "generator": torch.Generator().manual_seed(0), **kwargs}
    return pipe(prompt, output_type="latent", **kwargs).frames


@pytest.fixture
def saved(tiny_pipeline, tmp_path):
    """A folder and a single file of one model."""
    tiny_pipeline.save_pretrained(tmp_path / "folder")
    tiny_pipeline.save_single_file(tmp_path / "model.safetensors")
    return tmp_path / "folder", tmp_path / "model.safetensors"


# Calls.


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("guidance_scale", 5.0, "distilled models take no guidance"),
        ("num_inference_steps", 50, r"denoising_timesteps in the pipeline's config \(4 here\)"),
        ("negative_prompt", "ugly", "there is no negative prompt"),
        ("negative_prompt", ["ugly"], "there is no negative prompt"),
        ("num_videos_per_prompt", 2, "give the prompt as a list"),
        ("attention_kwargs", {"scale": 0.5}, r"set_adapters\(\)"),
        ("seed", 3, "generator="),
        ("num_chunk", 3, "did you mean 'num_chunks'"),
        ("initial_latent", None, "did you mean 'initial_latents'"),
        ("zzz", 1, "it takes .*image, .*video"),
    ],
)
def test_unknown_arguments_are_answered_by_name(tiny_pipeline, name, value, remedy):
    for call in (tiny_pipeline, tiny_pipeline.stream):
        with pytest.raises(TypeError, match=f"ARVDPipeline got an unexpected argument '{name}': .*{remedy}"):
            call(PROMPT, **{name: value})


def test_arguments_of_other_pipelines_pass_where_they_ask_for_nothing(tiny_pipeline):
    neutral = {
        "guidance_scale": 1.0,
        "guidance_scale_2": None,
        "negative_prompt": "",
        "negative_prompt_embeds": None,
        "num_videos_per_prompt": 1,
        "num_inference_steps": 4,
        "attention_kwargs": {},
    }
    assert torch.equal(latents_of(tiny_pipeline, **neutral), latents_of(tiny_pipeline))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a", None]}, "prompt is a list with None at 1"),
        ({"height": 0}, "height is 0, expected a multiple of 16"),
        ({"width": -16}, "width is -16, expected a multiple of 16"),
        ({"height": 32.0}, "height is 32.0, expected a positive number of pixels"),
        ({"num_chunks": 2.0}, "num_chunks is 2.0, expected an integer"),
        ({"num_chunks": None, "num_frames": 9.0}, "num_frames is 9.0, expected an integer"),
        ({"generator": 7}, "generator is 7, expected a torch.Generator"),
        ({"generator": (torch.Generator(),)}, r"generator is \(<torch"),
        ({"generator": [3]}, r"generator is \[3\]"),
        ({"latents": [[0.0]]}, "latents is a list, expected a torch.Tensor"),
        (
            {"initial_latents": torch.zeros(1, 4, 3, 4, 6).numpy()},
            "initial_latents is a ndarray, expected a torch.Tensor",
        ),
    ],
)
def test_values_that_cannot_work_are_refused_before_work(tiny_pipeline, given, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.stream(**{"prompt": PROMPT, "num_chunks": 1, **given})


def test_a_new_prompt_is_checked_like_the_first(tiny_pipeline):
    with tiny_pipeline.stream(PROMPT, output_type="latent") as stream, pytest.raises(ValueError, match="None at 0"):
        stream.set_prompt([None])


# Loading.


def dtypes(pipe):
    parts = (pipe.transformer.blocks[0].ffn, pipe.vae, pipe.text_encoder)
    return [next(part.parameters()).dtype for part in parts]


@pytest.mark.parametrize("name", ("dtype", "torch_dtype"))
def test_both_spellings_of_dtype_reach_every_part(saved, name):
    folder, file = saved
    each = {"transformer": BF16, "default": FP32}
    for load in (
        lambda dtype: ARVDPipeline.from_pretrained(folder, **{name: dtype}),
        lambda dtype: ARVDPipeline.from_pretrained(folder, memory="max", **{name: dtype}),
        lambda dtype: ARVDPipeline.from_single_file(file, base=folder, **{name: dtype}),
    ):
        assert dtypes(load(BF16)) == [BF16] * 3
        assert dtypes(load(each)) == [BF16, FP32, FP32]
    alone = ARVDPipeline.from_single_file(file, **{name: BF16})
    assert alone.transformer.blocks[0].ffn.net[2].weight.dtype == BF16
    assert dtypes(ARVDPipeline.from_single_file(file, base=folder, memory="max")) == [FP32] * 3
    with pytest.raises(ValueError, match="two names of one argument"):
        ARVDPipeline.from_pretrained(folder, dtype=FP32, torch_dtype=BF16)


def test_misspelt_fields_are_refused(saved):
    folder, file = saved
    for load in (ARVDPipeline.from_pretrained, ARVDPipeline.from_single_file):
        with pytest.raises(TypeError, match="ARVDPipeline has no field 'sink_frame': did you mean 'sink_frames'"):
            load(folder if load == ARVDPipeline.from_pretrained else file, sink_frame=3)
    with pytest.raises(TypeError, match="did you mean 'local_attention_frames'"):
        ARVDPipeline.from_pretrained(folder, local_attn_frames=9, memory="max")


def test_single_files_honour_or_name_what_loaders_take(saved):
    folder, file = saved
    config = QARVDConfig("w8a8_dynamic")
    for base in (None, folder):
        assert (
            ARVDPipeline.from_single_file(file, base=base, quantization_config=config).quantization.scheme
            == config.scheme
        )
        with pytest.raises(ValueError, match=r"device_map .*call to\(\)"):
            ARVDPipeline.from_single_file(file, base=base, device_map="balanced")
    with pytest.raises(TypeError, match=r"from_single_file takes \['variant'\] only for the components of a base"):
        ARVDPipeline.from_single_file(file, variant="fp16")
    quantized = ARVDPipeline.from_single_file(file, quantization_config=config)
    quantized.save_single_file(file)
    with pytest.raises(ValueError, match="quantized already"):
        ARVDPipeline.from_single_file(file, quantization_config=QARVDConfig("w8a16"))


def test_pickles_are_not_written(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization=False writes pickles"):
        tiny_pipeline.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()
    tiny_pipeline.quantize(QARVDConfig("w8a8_dynamic"))
    with pytest.raises(ValueError, match="safe_serialization=False writes pickles"):
        tiny_pipeline.transformer.save_pretrained(tmp_path / "transformer", safe_serialization=False)
