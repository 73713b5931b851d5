"""Train the small AutoencoderKLWan on moving shapes.

    python train_vae.py --out runs/tiny_arvd/vae --minutes 6

Two stages: short clips with many scenes per batch (form and colour), then long clips (no drift far into a stream).
Deterministic autoencoder: the posterior's log-variance is a constant, and the decoder sees latents with noise of a tenth
of each channel's spread, so that it tolerates what the transformer gets wrong. A run that finds a checkpoint in `--out`
continues from it. A later run with `--decoder-only` spends more time on the decoder alone, on `--short` clips.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from parallel_vae import decode_video, encode_moments
from safetensors.torch import load_file, save_file
from scenes import NUM_STATES, SceneBatch, render, sample_scenes

CONFIG = dict(
    base_dim=8,
    decoder_base_dim=16,
    z_dim=16,
    dim_mult=[1, 2, 4, 4],
    num_res_blocks=1,
    temperal_downsample=[False, True, True],
)
LATENT_NOISE = 0.1  # of a channel's standard deviation
LOG_VARIANCE = -6.0


def build_vae(config: dict) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(**config, latents_mean=[0.0] * config["z_dim"], latents_std=[1.0] * config["z_dim"])
    with torch.no_grad():
        vae.quant_conv.weight[config["z_dim"] :].zero_()
        vae.quant_conv.bias[config["z_dim"] :].fill_(LOG_VARIANCE)
    return vae


def reconstruction_loss(vae: AutoencoderKLWan, video: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE, foreground four times, and a weak pull of the latents towards zero."""
    mean = encode_moments(vae, video).chunk(2, dim=1)[0].float()
    spread = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    decoded = decode_video(vae, mean + LATENT_NOISE * spread * torch.randn_like(mean)).float()
    return _pixel_loss(decoded, video, background, margin=0, gain=3.0) + 1e-4 * mean.square().mean()


def decoder_loss(vae: AutoencoderKLWan, video: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """The same with the latents as they are; a margin around the objects counts too, for clean outlines."""
    with torch.no_grad():
        mean = encode_moments(vae, video).chunk(2, dim=1)[0].float()
        amount = 1.5 * LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, 1, device=mean.device)
        mean = mean + amount * mean.std(dim=(0, 2, 3, 4), keepdim=True) * torch.randn_like(mean)
    return _pixel_loss(decode_video(vae, mean).float(), video, background, margin=2, gain=5.0)


def _pixel_loss(decoded, video, background, margin: int, gain: float) -> torch.Tensor:
    error = decoded - video
    foreground = ((video - background[:, :, None, None, None]).abs().amax(dim=1, keepdim=True) > 0.05).float()
    if margin:
        foreground = F.max_pool3d(foreground, (1, 2 * margin + 1, 2 * margin + 1), stride=1, padding=(0, margin, margin))
    return ((error.abs() + 2 * error.square()) * (1 + gain * foreground)).mean()


@torch.no_grad()
def psnr_per_frame(vae: AutoencoderKLWan, scenes: SceneBatch, state: torch.Tensor, num_frames: int) -> torch.Tensor:
    """[num_frames] dB, over the whole picture of every clip, from the noise-free latents."""
    errors = []
    for i in range(0, len(scenes), 16):
        video = render(scenes[i : i + 16], state[i : i + 16], num_frames)
        decoded = decode_video(vae, encode_moments(vae, video).chunk(2, dim=1)[0]).clamp(-1, 1)
        errors.append(((decoded - video) / 2).square().mean(dim=(1, 3, 4)))
    return -10 * torch.cat(errors).mean(dim=0).log10()


@torch.no_grad()
def with_latent_statistics(vae: AutoencoderKLWan, scenes: SceneBatch, state: torch.Tensor) -> AutoencoderKLWan:
    """Write the latents' per-channel mean and standard deviation into the config."""
    latents = torch.cat(
        [
            encode_moments(vae, render(scenes[i : i + 16], state[i : i + 16], 81)).chunk(2, dim=1)[0].float()
            for i in range(0, len(scenes), 16)
        ]
    )
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


def save(folder: Path, ema: AutoencoderKLWan, raw: AutoencoderKLWan, seconds: float) -> None:
    ema.save_pretrained(folder)
    temporary = folder / "raw.tmp"
    save_file(raw.state_dict(), temporary)
    os.replace(temporary, folder / "raw.safetensors")
    (folder / "progress.json").write_text(json.dumps({"seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="length of the whole training, resumed parts included")
    parser.add_argument("--long-fraction", type=float, default=0.4, help="share of the time spent on long clips")
    parser.add_argument("--short", type=int, nargs=2, default=(24, 17), metavar=("CLIPS", "FRAMES"))
    parser.add_argument("--long", type=int, nargs=2, default=(6, 89), metavar=("CLIPS", "FRAMES"))
    parser.add_argument("--pool", type=int, default=20000, help="number of distinct scenes")
    parser.add_argument("--eval-clips", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="sharpen the decoder of the VAE in --out; its latents stay as they are, so a transformer stays valid",
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    device, on_gpu = args.device, args.device.startswith("cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    vae, done = build_vae(CONFIG).to(device), 0.0
    if args.decoder_only:
        vae = AutoencoderKLWan.from_pretrained(args.out).to(device)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        args.long_fraction = 0.0
    elif (args.out / "raw.safetensors").exists():
        vae.load_state_dict(load_file(args.out / "raw.safetensors"))
        done = json.loads((args.out / "progress.json").read_text())["seconds"]
    ema = copy.deepcopy(vae).requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    averaged = [e for e, p in zip(ema.parameters(), vae.parameters(), strict=True) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=on_gpu)
    pool = SceneBatch.from_scenes(sample_scenes(args.pool, seed=1)).to(device)
    held_out = SceneBatch.from_scenes(sample_scenes(args.eval_clips, seed=2, held_out=True)).to(device)
    held_out_state = torch.randn(args.eval_clips, NUM_STATES, generator=torch.Generator().manual_seed(3)).to(device)
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters, {len(pool)} scenes", flush=True)

    plain_loss = decoder_loss if args.decoder_only else reconstruction_loss
    loss_fn = torch.compile(plain_loss) if args.compile else plain_loss
    total, step, begun, saved, stage = 60 * args.minutes, 0, time.time(), time.time(), None
    while (elapsed := done + time.time() - begun) < total:
        progress = elapsed / total
        long = progress > 1 - args.long_fraction
        if long != stage:
            stage = long
            loss_fn = plain_loss if long else loss_fn  # one shape is compiled; the second would cost a minute
        clips, frames = args.long if long else args.short
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200) * max(0.02, 1 - progress)
        chosen = torch.randint(len(pool), (clips,), device=device)
        state = torch.randn(clips, NUM_STATES, device=device)
        video = render(pool[chosen], state, frames)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=on_gpu):
            loss = loss_fn(vae, video, pool.background[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.998, step / (step + 20))
            torch._foreach_lerp_(averaged, trained, 1 - decay)
        step += 1
        if step % 500 == 0 or step in (10, 100):
            print(f"{elapsed:6.1f}s step {step} {'long' if long else 'short'} loss {loss.item():.4f}", flush=True)
        if step % 2000 == 0:
            frames_db = psnr_per_frame(ema, held_out, held_out_state, 41)
            print(f"   psnr {frames_db.mean():.2f} dB, last frame {frames_db[-1]:.2f} dB", flush=True)
        if time.time() - saved > 60:
            saved = time.time()
            save(args.out, ema, vae, elapsed)

    if not args.decoder_only:
        with_latent_statistics(ema, pool[:64], torch.randn(len(pool), NUM_STATES, device=device)[:64])
    save(args.out, ema, vae, elapsed)
    frames_db = psnr_per_frame(ema.float(), held_out, held_out_state, 161 if on_gpu else 17)
    print(f"done: {step} steps, {elapsed:.0f}s; PSNR {frames_db.mean():.2f} dB; frames 0/8/40/80/120/160:")
    print([round(frames_db[i].item(), 2) for i in (0, 8, 16, 40, 80, 120, 160) if i < len(frames_db)])
    print("latents std", [round(s, 2) for s in ema.config.latents_std], flush=True)


if __name__ == "__main__":
    main()
