"""Train the small AutoencoderKLWan on moving shapes.

    python train_vae.py --out runs/tiny_arvd/vae --minutes 6

Two stages: short clips with many scenes per batch (form and color), then long clips (no drift far into a stream).
The autoencoder is deterministic: the posterior's log-variance is a constant, and the decoder sees latents with noise
of a tenth of each channel's spread, so that it tolerates errors of the transformer. A run that finds a checkpoint in
`--out` continues from it. A later run with `--decoder-only` spends more time on the decoder alone, on `--short` clips.
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

CONFIG = {
    "base_dim": 8,
    "decoder_base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
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
        foreground = F.max_pool3d(
            foreground, (1, 2 * margin + 1, 2 * margin + 1), stride=1, padding=(0, margin, margin)
        )
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="length of the whole training, resumed parts included"
    )
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
    return parser.parse_args()


class Trainer:
    """One training run of the VAE, or of its decoder alone."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device, self.done = args, args.device, 0.0
        self.on_gpu = args.device.startswith("cuda")
        if args.decoder_only:
            self.vae = AutoencoderKLWan.from_pretrained(args.out).to(args.device)
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        else:
            self.vae = build_vae(CONFIG).to(args.device)
            if (args.out / "raw.safetensors").exists():
                self.vae.load_state_dict(load_file(args.out / "raw.safetensors"))
                self.done = json.loads((args.out / "progress.json").read_text())["seconds"]
        self.ema = copy.deepcopy(self.vae).requires_grad_(False)
        self.trained = [p for p in self.vae.parameters() if p.requires_grad]
        pairs = zip(self.ema.parameters(), self.vae.parameters(), strict=True)
        self.averaged = [mean for mean, p in pairs if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=self.on_gpu
        )
        self.pool = SceneBatch.from_scenes(sample_scenes(args.pool, seed=1)).to(args.device)
        self.held_out = SceneBatch.from_scenes(sample_scenes(args.eval_clips, seed=2, held_out=True)).to(args.device)
        state = torch.randn(args.eval_clips, NUM_STATES, generator=torch.Generator().manual_seed(3))
        self.held_out_state = state.to(args.device)
        self.plain_loss = decoder_loss if args.decoder_only else reconstruction_loss
        self.short_loss = torch.compile(self.plain_loss) if args.compile else self.plain_loss
        self.steps = 0

    def step(self, progress: float) -> torch.Tensor:
        """One optimizer step at `progress` in [0, 1] of the whole training; returns the loss."""
        long = progress > 1 - self.args.long_fraction and not self.args.decoder_only
        clips, frames = self.args.long if long else self.args.short
        loss_fn = self.plain_loss if long else self.short_loss  # compiling for a second shape would cost a minute
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1.0, (self.steps + 1) / 200) * max(0.02, 1 - progress)
        chosen = torch.randint(len(self.pool), (clips,), device=self.device)
        video = render(self.pool[chosen], torch.randn(clips, NUM_STATES, device=self.device), frames)
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.on_gpu):
            loss = loss_fn(self.vae, video, self.pool.background[chosen])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            decay = min(0.998, self.steps / (self.steps + 20))
            torch._foreach_lerp_(self.averaged, self.trained, 1 - decay)
        self.steps += 1
        return loss.detach()

    def train(self) -> None:
        """Steps until the time is over; prints, evaluates, saves once a minute, and leaves the averaged VAE."""
        total, begun, saved = 60 * self.args.minutes, time.time(), time.time()
        while (elapsed := self.done + time.time() - begun) < total:
            loss = self.step(elapsed / total)
            if self.steps % 500 == 0:
                print(f"{elapsed:6.1f}s step {self.steps} loss {loss.item():.4f}", flush=True)
            if self.steps % 2000 == 0:
                frames_db = psnr_per_frame(self.ema, self.held_out, self.held_out_state, 41)
                print(f"   psnr {frames_db.mean():.2f} dB, last frame {frames_db[-1]:.2f} dB", flush=True)
            if time.time() - saved > 60:
                saved = time.time()
                save(self.args.out, self.ema, self.vae, elapsed)
        if not self.args.decoder_only:
            state = torch.randn(len(self.pool), NUM_STATES, device=self.device)
            with_latent_statistics(self.ema, self.pool[:64], state[:64])
        save(self.args.out, self.ema, self.vae, elapsed)

    def report(self) -> None:
        frames_db = psnr_per_frame(self.ema, self.held_out, self.held_out_state, 161 if self.on_gpu else 17)
        print(f"{self.steps} steps; PSNR {frames_db.mean():.2f} dB; of single frames:")
        print({i: round(frames_db[i].item(), 2) for i in (0, 8, 16, 40, 80, 120, 160) if i < len(frames_db)})


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    trainer = Trainer(args)
    trainer.train()
    trainer.report()


if __name__ == "__main__":
    main()
