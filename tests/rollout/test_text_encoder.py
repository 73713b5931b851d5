"""Where the text encoder waits, and embeddings from a file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from qarvd_diffusers import QARVDConfig
from qarvd_diffusers.rollout.text_encoder import save_prompt_embeds

PROMPT = "a red circle moves left"


def latents_of(pipe, prompt=PROMPT, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_chunks=1, generator=generator, output_type="latent", **kwargs).frames


@pytest.mark.parametrize("mode", ["cpu", "stream", "free"])
def test_offloaded_encoders_say_the_same(tiny_pipeline, mode):
    expected = latents_of(tiny_pipeline)
    tiny_pipeline.offload_text_encoder(mode)
    assert torch.equal(latents_of(tiny_pipeline), expected)
    if mode == "free":
        assert tiny_pipeline.text_encoder is None
        with pytest.raises(
            ValueError, match=r"no text encoder or tokenizer any more \(text_encoder_offload is 'free'\)"
        ):
            tiny_pipeline.stream(PROMPT)
    else:
        assert torch.equal(latents_of(tiny_pipeline), expected)


def test_a_streamed_encoder_leaves_its_table_in_host_memory(tiny_pipeline):
    """Two modules are tied to the table, and of the two the encoder asks the one that is not its input embedding."""
    encoder = tiny_pipeline.text_encoder
    table = encoder.get_input_embeddings().weight
    tiny_pipeline.offload_text_encoder("stream")
    holding = [m for m in encoder.modules() if any(p is table for p in m.parameters(recurse=False))]
    assert len(holding) == 2 and not any(hasattr(module, "_diffusers_hook") for module in holding)
    linears = [module for module in encoder.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and all(hasattr(module, "_diffusers_hook") for module in linears)


def test_a_waiting_encoder_stays_behind(tiny_pipeline):
    """Seen on the meta device, which needs no hardware: everything else moves, the dtype goes along."""
    tiny_pipeline.offload_text_encoder("cpu")
    tiny_pipeline.to(dtype=torch.bfloat16)
    assert tiny_pipeline.text_encoder.dtype == torch.bfloat16
    tiny_pipeline.to("meta")
    assert tiny_pipeline.transformer.device.type == tiny_pipeline.vae.device.type == "meta"
    assert tiny_pipeline.text_encoder.device.type == "cpu"
    assert tiny_pipeline.config.text_encoder == ("transformers", "UMT5EncoderModel")


def test_embeddings_from_a_file(tiny_pipeline, tmp_path):
    expected = latents_of(tiny_pipeline)
    path = tmp_path / "prompt.safetensors"
    save_prompt_embeds(tiny_pipeline.encode_prompt(PROMPT), path)
    tiny_pipeline.text_encoder = None
    assert torch.equal(latents_of(tiny_pipeline, None, prompt_embeds=path), expected)
    stream = tiny_pipeline.stream(prompt_embeds=str(path), generator=torch.Generator().manual_seed(0), num_chunks=2)
    next(stream)
    stream.set_prompt(prompt_embeds=path)
    next(stream)
    save_file({"embeds": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has no tensor named 'prompt_embeds', but"):
        stream.set_prompt(prompt_embeds=tmp_path / "other.safetensors")
    right = load_file(path)["prompt_embeds"]
    for wrong, message in (
        (b"no", "truncated, or not a safetensors file"),
        (path.read_bytes()[:-1], "holds 767 bytes of tensors, its header lists 768"),
        (right.int(), r"prompt_embeds is int32 .*, expected floats \[B, text_tokens, text_dim\]"),
        (right[0], r"prompt_embeds is float32 .*, expected floats"),
        (torch.full_like(right, float("nan")), "prompt_embeds holds nan, expected finite values"),
    ):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(wrong) if isinstance(wrong, bytes) else save_file({"prompt_embeds": wrong}, broken)
        with pytest.raises(ValueError, match=rf"broken\.safetensors: {message}"):
            tiny_pipeline.stream(prompt_embeds=broken)


def test_int8_encoder_is_close_and_can_wait(tiny_pipeline):
    expected = tiny_pipeline.encode_prompt(PROMPT)
    tiny_pipeline.quantize(QARVDConfig("w8a8_dynamic", text_encoder="int8"))
    weight = tiny_pipeline.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight
    assert weight.dtype != torch.int8 and type(weight).__name__ == "WeightQBytesTensor"
    got = tiny_pipeline.encode_prompt(PROMPT)
    assert 0 < (got - expected).abs().max() < 0.05 * expected.std()
    tiny_pipeline.offload_text_encoder("cpu")
    assert latents_of(tiny_pipeline).isfinite().all()
    with pytest.raises(ValueError, match="an int8 text encoder cannot be streamed"):
        tiny_pipeline.offload_text_encoder("stream")


def test_modes_are_refused_by_name(tiny_pipeline):
    with pytest.raises(ValueError, match="offload is 'disk', expected one of keep, cpu, stream, free"):
        tiny_pipeline.offload_text_encoder("disk")
    tiny_pipeline.offload_text_encoder("stream")
    with pytest.raises(ValueError, match="stays streamed"):
        tiny_pipeline.offload_text_encoder("cpu")
