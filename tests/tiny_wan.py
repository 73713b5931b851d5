"""A tiny Wan transformer, a rollout that drives it the way a pipeline does, and a tiny VAE of Wan 2.2's kind."""

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from qarvd_diffusers.rollout.pass_info import PassInfo

CHUNKS, STEPS = 3, 2


def make_wan(seed=0, planted=True, layers=2):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24,
        freq_dim=32, ffn_dim=64, num_layers=layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()  # fmt: skip
    if planted:  # outlier channels that leave the function unchanged: rows of v scaled down, columns of o scaled up
        with torch.no_grad():
            for block in model.blocks:
                v, o = block.attn1.to_v, block.attn1.to_out[0]
                v.weight[:2] /= 16
                v.bias[:2] /= 16
                o.weight[:, :2] *= 16
    return model


def make_wan22_vae():
    """16x smaller pictures, pixels shuffled in pairs, residual blocks."""
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()


def make_run(model, prompts=1, chunks=CHUNKS, announce=True):
    """Every chunk: denoising passes, then a refresh pass; noise and prompts are fixed."""

    def run(on_pass):
        for prompt in range(prompts):
            g = torch.Generator().manual_seed(prompt)
            text = torch.randn(1, 6, 24, generator=g)
            for chunk in range(chunks):
                for step in range(STEPS + 1):
                    role, timestep = ("denoise", 1000.0 / (step + 1)) if step < STEPS else ("refresh", 0.0)
                    info = PassInfo(chunk, role, step if step < STEPS else 0, timestep, 3 * chunk, 3)
                    if announce:
                        on_pass(info)
                    x = torch.randn(1, 4, 3, 4, 4, generator=g) * (1 + chunk)
                    model(x, torch.tensor([timestep]), text)

    return run
