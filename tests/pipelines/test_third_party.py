"""A pipeline that shares nothing with Wan becomes streamable and quantizable by inheriting `ARVDMixin`."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from qarvd_diffusers import ARVDMixin, FewStepRenoiseScheduler, KVCache, QARVDConfig
from qarvd_diffusers.quantization.model import quantized_linears
from qarvd_diffusers.rollout.inputs import StreamInputs


class Denoiser(ModelMixin, ConfigMixin):
    """Mixes a chunk with the mean of all earlier ones; `cache` is a list of them."""

    @register_to_config
    def __init__(self, channels: int = 4, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2 * channels, width), nn.Linear(width, channels)])

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        x = torch.cat([latents, past.expand_as(latents)], dim=1).movedim(1, -1)
        x = self.blocks[1](torch.nn.functional.gelu(self.blocks[0](x)))
        return x.movedim(-1, 1) * (1 + timestep.view(-1, 1, 1, 1, 1) / 1000)


class Memory:
    def __init__(self) -> None:
        self.chunks: dict[int, torch.Tensor] = {}


class ToyPipeline(ARVDMixin, DiffusionPipeline):
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self, transformer: Denoiser, scheduler: FewStepRenoiseScheduler | None = None, num_frames_per_chunk: int = 3
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler or FewStepRenoiseScheduler())
        self.register_to_config(num_frames_per_chunk=num_frames_per_chunk)  # the other causal fields keep defaults

    def encode_prompt(self, prompt=None, prompt_embeds=None, max_sequence_length=None, device=None, dtype=None):
        return prompt_embeds if prompt_embeds is not None else torch.full((1, 1, 1), float(len(prompt)))

    def check_stream_inputs(self, *, num_chunks, generator, **rest) -> StreamInputs:
        return StreamInputs(self.rollout_config, (1, 4, 2, 2), num_chunks, generator=generator)

    def run_pass(self, latents, timestep, prompt_embeds, *, kv_cache, frame_offset, cache_only=False):
        past = [chunk for offset, chunk in kv_cache.chunks.items() if offset < frame_offset]
        mean = torch.stack(past).mean() if past else prompt_embeds.mean() / 100
        kv_cache.chunks[frame_offset] = latents
        return self.transformer(latents, timestep, mean.view(1, 1, 1, 1, 1))

    def make_cache(self, num_frames: int | None) -> KVCache:
        return Memory()

    def make_decoder(self):
        raise NotImplementedError("latents only")


def test_stream_and_quantize(tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path))
    torch.manual_seed(0)
    pipe = ToyPipeline(Denoiser())
    pipe.set_progress_bar_config(disable=True)

    def latents() -> torch.Tensor:
        stream = pipe.stream("abc", num_chunks=3, generator=torch.Generator().manual_seed(1), output_type="latent")
        return torch.cat([chunk.latents for chunk in stream], dim=2)

    expected = latents()
    assert expected.shape == (1, 4, 9, 2, 2)
    pipe.quantize(QARVDConfig("w8a8", calibration_prompts=("abc",), calibration_chunks=3))
    assert set(quantized_linears(pipe.transformer)) == {"blocks.0", "blocks.1"}
    error = (latents() - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    again = Denoiser.from_pretrained(tmp_path / "transformer")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in pipe.transformer.state_dict().items())
