"""Train the causal transformer (and its text encoder) on latents of moving shapes.

    python train_transformer.py --vae runs/tiny_arvd/vae --out runs/tiny_arvd/transformer --minutes 16

Three sources of training inputs, one target (the true latents, see `coupling.py` for why it is unique):
 - pairs: 30-chunk clips, clean and noisy versions of every chunk in one pass; the clean ones are true (teacher
   forcing) or, increasingly, the model's own stream (`generate` with the averaged weights), so that errors do not
   accumulate;
 - singles: chunk 0 alone, the hardest, at many more scenes;
 - at every denoising step the noisy input is made the way generation makes it, from the previous step's estimate.
A run that finds a checkpoint in `--out` continues from it; `--stop-after` splits a training into several runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from causal import CHUNK_FRAMES, STATE_STEP, Layout, generate, make_parallel, sigmas
from coupling import write_state
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from evaluate import evaluate
from huggingface_hub import save_torch_state_dict
from parallel_vae import encode_moments, latent_statistics
from safetensors.torch import load_file
from scenes import NUM_STATES, SceneBatch, render, sample_scenes
from text import build_text_encoder, build_tokenizer, encode, tokenize
from torch import nn

CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 256,
    "ffn_dim": 576,
    "num_layers": 6,
}
LEVELS = sigmas()


class Generator(nn.Module):
    """Transformer and text encoder, so that both share one optimizer and one average."""

    def __init__(self, config: dict, vocab_size: int):
        super().__init__()
        self.transformer = WanTransformer3DModel(**config)
        self.text_encoder = build_text_encoder(vocab_size)
        # keep the residual stream in float32 under autocast
        self.transformer.patch_embedding.register_forward_hook(lambda module, args, output: output.float())


@dataclass
class Bank:
    """Encoded clips. Clips 2i and 2i + 1 show the same scene in different states."""

    latents: torch.Tensor  # float16 [N, chunks, 16, 3, H, W], normalised
    state: torch.Tensor  # [N, 8]
    ids: torch.Tensor  # int64 [N, 24]


@torch.no_grad()
def build_bank(vae: AutoencoderKLWan, tokenizer, count: int, num_chunks: int, seed: int, batch: int) -> Bank:
    device = vae.device
    scenes = [scene for scene in sample_scenes(count // 2, seed) for _ in range(2)]
    ids = tokenize(tokenizer, [scene.prompt for scene in scenes]).to(device)
    batches, state = SceneBatch.from_scenes(scenes).to(device), torch.randn(count, NUM_STATES, device=device)
    mean, std = latent_statistics(vae, device)
    latents = []
    for i in range(0, count, batch):
        video = render(batches[i : i + batch], state[i : i + batch], 4 * (CHUNK_FRAMES * num_chunks - 1) + 1)
        encoded = encode_moments(vae, video).chunk(2, dim=1)[0]
        latents.append(((encoded - mean) / std).unflatten(2, (num_chunks, -1)).transpose(1, 2).half())
    return Bank(torch.cat(latents), state, ids)


@dataclass
class Rollouts:
    """The model's own streams for some clips of a bank: `estimates` [n, chunks, 4, 16, 3, H, W] float16."""

    clips: torch.Tensor
    estimates: torch.Tensor


@torch.no_grad()
def roll_out(model: Generator, bank: Bank, count: int, autocast) -> Rollouts:
    clips = torch.randint(len(bank.state), (count,), device=bank.state.device)
    chunks, size = bank.latents.shape[1], bank.latents.shape[-1]
    with autocast():
        text = encode(model.text_encoder, bank.ids[clips])
        estimates = generate(model.transformer, text, chunks, size, bank.state[clips])
    return Rollouts(clips, estimates.half())


def noisy_inputs(bank: Bank, clips: torch.Tensor, rollouts: Rollouts | None, rows: torch.Tensor, own: torch.Tensor):
    """Inputs of one denoising step for every chunk of `clips` [n].

    `own` [n] marks the clips whose context and previous estimates come from `rollouts[rows]` and not from the truth.
    Returns clean context, noisy input, truth (each [n, chunks, 16, 3, H, W]), sigma [n, chunks, 1, 1, 1, 1].
    """
    truth = bank.latents[clips].float()
    count, chunks = truth.shape[:2]
    device = truth.device
    levels = torch.tensor(LEVELS, device=device)
    step = torch.randint(len(LEVELS), (count, chunks), device=device)
    sigma = levels[step][..., None, None, None, None]
    previous = truth.clone()
    # At the steps where the noise of chunk 0 chooses the scene, the previous estimate showed another state of it.
    partner = bank.latents[clips ^ 1, 0].float()
    previous[:, 0] = torch.where((step[:, 0] <= STATE_STEP)[:, None, None, None, None], partner, truth[:, 0])
    clean = truth + 0.1 * torch.rand(count, 1, 1, 1, 1, 1, device=device) * torch.randn_like(truth)
    if rollouts is not None:
        mine = own[:, None, None, None, None, None]
        picked = rollouts.estimates[rows[:, None], torch.arange(chunks, device=device), (step - 1).clamp(min=0)]
        previous = torch.where(mine, picked.float(), previous)
        clean = torch.where(mine, rollouts.estimates[rows, :, -1].float(), clean)
    noisy = (1 - sigma) * previous + sigma * torch.randn_like(truth)
    level = sigma[:, 0, 0, 0, 0]
    forced = write_state(noisy[:, 0], bank.state[clips], level)
    noisy[:, 0] = torch.where((step[:, 0] <= STATE_STEP)[:, None, None, None, None], forced, noisy[:, 0])
    return clean, noisy, truth, sigma


def training_loss(model: Generator, long: Bank, short: Bank, rollouts: dict, layout: Layout, own_share: float):
    """Mean squared error of the estimates of the clean latents: pairs, singles."""
    device = long.state.device

    def draw(bank: Bank, count: int, name: str):
        own = torch.rand(count, device=device) < own_share
        clips, rows = torch.randint(len(bank.state), (count,), device=device), torch.zeros(count, dtype=torch.long)
        if rollouts.get(name) is not None:
            rows = torch.randint(len(rollouts[name].clips), (count,), device=device)
            clips = torch.where(own, rollouts[name].clips[rows], clips)
        return clips, noisy_inputs(bank, clips, rollouts.get(name), rows.to(device), own)

    clips, (clean, noisy, truth, sigma) = draw(long, layout.clips, "long")
    lone_clips, (_, lone, lone_truth, lone_sigma) = draw(short, layout.singles, "short")
    text = encode(model.text_encoder, torch.cat([long.ids[clips], short.ids[lone_clips]]))
    times = torch.stack([torch.zeros_like(sigma), 1000 * sigma], dim=2).flatten()
    elements = torch.cat([torch.stack([clean, noisy], dim=2).flatten(0, 2), lone[:, 0]])
    velocity = model.transformer(elements, torch.cat([times, 1000 * lone_sigma.flatten()]), text, return_dict=False)[0]
    velocity = velocity.float()
    pair = velocity[: layout.paired].unflatten(0, (layout.clips, layout.chunks, 2))[:, :, 1]
    pair_loss = (noisy - sigma * pair - truth).square().mean()
    lone_loss = (lone[:, 0] - lone_sigma[:, 0] * velocity[layout.paired :] - lone_truth[:, 0]).square().mean()
    return pair_loss, lone_loss


def save_checkpoint(folder: Path, model: Generator, ema: Generator, optimizer, progress: dict) -> None:
    """Weights in float32, averaged weights and Adam's second moment in bfloat16; the first recovers in a few steps."""
    tensors = {}
    averaged = dict(ema.named_parameters())
    for name, parameter in model.named_parameters():
        tensors["weight." + name] = parameter.detach().cpu()
        tensors["ema." + name] = averaged[name].detach().bfloat16().cpu()
        if parameter in optimizer.state:
            tensors["second_moment." + name] = optimizer.state[parameter]["exp_avg_sq"].bfloat16().cpu()
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_torch_state_dict(tensors, str(temporary), max_shard_size="15MB")
    (temporary / "progress.json").write_text(json.dumps(progress))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for shard in sorted(folder.glob("*.safetensors")) for k, v in load_file(shard).items()}


def load_checkpoint(folder: Path, model: Generator, ema: Generator, optimizer) -> dict:
    tensors, progress = load_tensors(folder), json.loads((folder / "progress.json").read_text())
    averaged = dict(ema.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors["weight." + name])
            averaged[name].copy_(tensors["ema." + name])
            optimizer.state[parameter] = {
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": tensors["second_moment." + name].to(parameter),
                "step": torch.tensor(float(progress["steps"]), device=parameter.device),
            }
    return progress


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=16.0, help="length of the whole training: sets the schedule")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="end this run after so many minutes")
    parser.add_argument("--clips", type=int, default=32, help="30-chunk clips per step")
    parser.add_argument("--chunks", type=int, default=30)
    parser.add_argument("--singles", type=int, default=512, help="lone chunks 0 per step")
    parser.add_argument("--long-bank", type=int, default=4096)
    parser.add_argument("--short-bank", type=int, default=131072)
    parser.add_argument("--rollouts", type=int, nargs=2, default=(512, 4096), help="own streams kept (long, chunk 0)")
    parser.add_argument("--refresh", type=int, default=100, help="steps between fresh roll-outs")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eval-every", type=float, default=100.0, help="seconds")
    parser.add_argument("--eval-prompts", type=int, default=96)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def learning_rate(peak: float, step: int, progress: float) -> float:
    return peak * min(1.0, (step + 1) / 300) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Trainer:
    """One training run: models, data, optimizer, and the clock that sets the schedule."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.begun = args, time.time()
        device, self.on_gpu = args.device, args.device.startswith("cuda")
        self.vae = AutoencoderKLWan.from_pretrained(args.vae).to(device).requires_grad_(False)
        self.size = 64 // self.vae.config.scale_factor_spatial
        self.tokenizer = build_tokenizer()
        self.model = Generator(CONFIG, len(self.tokenizer)).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=self.on_gpu)
        self.progress = {"steps": 0, "seconds": 0.0}
        if (args.out / "progress.json").exists():
            self.progress = load_checkpoint(args.out, self.model, self.ema, self.optimizer)
        seed = 2 * self.progress["steps"] + 1  # a resumed run sees new clips
        self.long = build_bank(self.vae, self.tokenizer, args.long_bank, args.chunks, seed, 32)
        self.short = build_bank(self.vae, self.tokenizer, args.short_bank, 1, seed + 1, 1024)
        self.rollouts: dict[str, Rollouts] = {}
        self.layout = Layout(args.clips, args.chunks, args.singles)
        make_parallel(self.model.transformer, self.layout, self.size)
        if args.compile:
            self.model.transformer.compile_repeated_blocks()
        print(
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.2f}M parameters; {len(self.long.state)} clips,"
        )
        print(
            f"{len(self.short.state)} first chunks after {time.time() - self.begun:.0f}s; {self.progress}", flush=True
        )

    @property
    def done(self) -> float:
        """Share of the whole training that is over."""
        return self.progress["seconds"] / (60 * self.args.minutes)

    def autocast(self):
        return torch.autocast(self.args.device.split(":")[0], torch.bfloat16, enabled=self.on_gpu)

    def step(self) -> torch.Tensor:
        """One optimizer step; returns the losses of pairs and singles, [2]."""
        args, steps = self.args, self.progress["steps"]
        own_share = 0.0 if self.done < 0.12 else 0.5 if self.done < 0.4 else 0.75
        if own_share and (not self.rollouts or steps % args.refresh == 0):
            self.rollouts["long"] = roll_out(self.ema, self.long, args.rollouts[0], self.autocast)
            self.rollouts["short"] = roll_out(self.ema, self.short, args.rollouts[1], self.autocast)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, steps, self.done)
        with self.autocast():
            losses = training_loss(self.model, self.long, self.short, self.rollouts, self.layout, own_share)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            decay = min(0.999, (steps + 1) / (steps + 20))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.progress["steps"] += 1
        return torch.stack(losses).detach()

    def train(self) -> None:
        """Steps until the training or this run's time is over; prints losses, evaluates, saves once a minute."""
        stop_at = self.begun + 60 * self.args.stop_after
        last = shown = evaluated = saved = time.time()
        losses = []
        while self.done < 1 and time.time() < stop_at:
            losses.append(self.step())
            if len(losses) == 200:
                pairs, singles = torch.stack(losses).mean(dim=0).tolist()
                state = f"{self.progress['seconds']:6.1f}s step {self.progress['steps']}"
                print(f"{state} pairs {pairs:.4f} chunk0 {singles:.4f} ({time.time() - shown:.1f}s)", flush=True)
                losses, shown = [], time.time()
            if time.time() - evaluated > self.args.eval_every:
                print("  ", self.evaluate(self.args.eval_prompts, 7), flush=True)
                evaluated = time.time()
            if time.time() - saved > 60:
                self.save()
                saved = time.time()
            self.progress["seconds"] += time.time() - last
            last = time.time()
        self.save()

    def save(self) -> None:
        save_checkpoint(self.args.out, self.model, self.ema, self.optimizer, self.progress)

    def evaluate(self, count: int, num_chunks: int, sheet: Path | None = None) -> dict[str, float]:
        chunks = min(num_chunks, self.args.chunks)
        with self.autocast():
            return evaluate(self.ema, self.tokenizer, self.vae, count, chunks, sheet)


def main() -> None:
    args = parse_args()
    torch.manual_seed(time.time_ns() % 2**32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    trainer = Trainer(args)
    trainer.train()
    print("7 chunks:", trainer.evaluate(2 * args.eval_prompts, 7))
    print("stream:", trainer.evaluate(args.eval_prompts, args.chunks, args.out / "sheet.png"))
    print(f"finished: {trainer.progress}", flush=True)


if __name__ == "__main__":
    main()
