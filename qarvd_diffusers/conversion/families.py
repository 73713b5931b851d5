"""List the released model families: how each rolls out, how its files are recognized, and what some still need.

The values are those of the released inference configurations. Everything that differs between families is in this
table; no other code depends on a model's name.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

from ..rollout.config import RolloutConfig


@dataclass(frozen=True)
class Network:
    """Hold the sizes by which a network is recognized.

    Attributes:
        dim: width.
        num_layers: number of blocks.
        in_channels: channels of its input: latents, and a picture where there is one.
        base: Hub id of the diffusers folder that provides VAE and text encoder.
        controls: whether it has layers for controls.
    """

    dim: int
    num_layers: int
    in_channels: int
    base: str
    controls: bool = False


NETWORKS = {
    "1.3B": Network(1536, 30, 16, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "5B": Network(3072, 30, 48, "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    "14B": Network(5120, 40, 16, "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    "1.3B world": Network(1536, 30, 36, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", controls=True),
    "14B world": Network(5120, 40, 36, "Wan-AI/Wan2.2-I2V-A14B-Diffusers", controls=True),
}


@dataclass(frozen=True)
class Family:
    """Describe one released model.

    Attributes:
        fields: how it rolls out.
        network: key of `NETWORKS`.
        source: Hub id and file names of the release.
        weights: which state dict to use where a file holds both, `generator` or `generator_ema`.
        file_names: parts of file or folder names by which it is recognized, in lower case; the longest match wins.
        has_lora: whether the release is a base and a LoRA that must be merged.
        licence: licence of the released weights, None if unknown; a model card next to the file overrides it.
        height: pixels of the training videos.
        width: see `height`.
        fps: frames per second of the training videos.
        lacks: mechanisms that its rollout needs and that are not implemented; such a model cannot be converted.
    """

    fields: RolloutConfig
    network: str = "1.3B"
    source: str = ""
    weights: str = "generator_ema"
    file_names: tuple[str, ...] = ()
    has_lora: bool = False
    licence: str | None = None
    height: int = 480
    width: int = 832
    fps: int = 16
    lacks: tuple[str, ...] = ()

    def pipeline_config(self) -> dict[str, Any]:
        """Return the values of the pipeline's config, as plain JSON types."""
        return {**self.fields.to_dict(), "height": self.height, "width": self.width, "fps": self.fps}

    def replace(self, **changes: Any) -> Family:
        """Return a copy with other values of some attributes."""
        return dataclasses.replace(self, **changes)


_FOUR_STEPS = (1000, 750, 500, 250)
_JOINT = "a sampler that denoises several chunks at different noise levels jointly"

_FRAMEWISE = Family(
    RolloutConfig(num_frames_per_chunk=1),
    source="zhuhz22/Causal-Forcing: framewise/causal_forcing.pt",
    file_names=("framewise", "causal_forcing-framewise", "causal_forcing_framewise"),
    licence="apache-2.0",
)


def _few_steps(*steps: int) -> RolloutConfig:
    return dataclasses.replace(_FRAMEWISE.fields, denoising_timesteps=steps, first_chunk_timesteps=_FOUR_STEPS)


# Table entries 0, 179, 358 and 679 of 1000; the second release takes 0, 250, 500 and 750.
_WORLD = Family(
    RolloutConfig(denoising_timesteps=(1000, 821, 642, 321), timestep_shift=10.0, sampler="renoise_integer"),
    network="14B world",
    source="LingBot-World: lingbot_world_fast/ in the folder of its camera or action model",
    file_names=("lingbot_world_fast", "lingbot-world-fast"),
    licence="apache-2.0",
)
_WORLD_2 = _WORLD.replace(
    fields=dataclasses.replace(
        _WORLD.fields,
        num_frames_per_chunk=4,
        denoising_timesteps=_FOUR_STEPS,
        local_attention_frames=18,
        sink_frames=6,
    ),
    source="LingBot-World 2.0: transformers/",
    file_names=("lingbot-world-v2", "lingbot_world_v2", "lingbot-world-2", "lingbot_world_2"),
    licence="cc-by-nc-sa-4.0",
)

FAMILIES: dict[str, Family] = {
    "self-forcing": Family(
        RolloutConfig(),
        source="gdhe17/Self-Forcing: checkpoints/self_forcing_dmd.pt",
        file_names=("self_forcing", "self-forcing", "selfforcing"),
        licence="apache-2.0",
    ),
    "causal-forcing": Family(
        RolloutConfig(),
        source="zhuhz22/Causal-Forcing: chunkwise/causal_forcing.pt",
        weights="generator",
        file_names=("causal_forcing", "causal-forcing", "chunkwise/causal_forcing"),
        licence="apache-2.0",
    ),
    "causal-forcing-framewise": _FRAMEWISE.replace(file_names=(*_FRAMEWISE.file_names, "framewise/causal_forcing")),
    "causal-forcing-framewise-2step": _FRAMEWISE.replace(
        fields=_few_steps(1000, 500),
        source="zhuhz22/Causal-Forcing: causal-forcing++/framewise-2step.pt",
        file_names=("framewise-2step", "causal-forcing++/framewise-2step"),
    ),
    "causal-forcing-framewise-1step": _FRAMEWISE.replace(
        fields=_few_steps(1000),
        source="zhuhz22/Causal-Forcing: causal-forcing++/framewise-1step.pt",
        file_names=("framewise-1step", "causal-forcing++/framewise-1step"),
    ),
    "longlive": Family(
        RolloutConfig(local_attention_frames=12, sink_frames=3, on_prompt_switch="recache"),
        source="Efficient-Large-Model/LongLive-1.3B: models/longlive_base.pt and models/lora.pt",
        weights="generator",
        file_names=("longlive",),
        has_lora=True,
    ),
    "causvid": Family(
        # The released list ends in 0, which its sampler drops.
        RolloutConfig(denoising_timesteps=(1000, 757, 522), warp_timesteps=False, timestep_shift=8.0),
        source="tianweiy/CausVid: autoregressive_checkpoint/model.pt",
        weights="generator",
        file_names=("causvid", "autoregressive_checkpoint"),
        licence="cc-by-nc-sa-4.0",
    ),
    "krea": Family(
        # The last step is a pass at timestep 0: it must not be dropped.
        RolloutConfig(denoising_timesteps=(*_FOUR_STEPS, 0), local_attention_frames=6, context_mode="rebuild"),
        network="14B",
        source="krea/krea-realtime-video",
        file_names=("krea",),
        licence="cc-by-nc-sa-4.0",
    ),
    "longlive-2": Family(
        RolloutConfig(
            num_frames_per_chunk=8,
            # 1000 * linspace(0.999, 0, 5) without its end; the shift makes 999, 937, 833 and 624 of them.
            denoising_timesteps=(999, 749.25, 499.5, 249.75),
            local_attention_frames=32,
            sink_frames=8,
            shot_rope_offset=8,
            shot_prefix="The scene transitions. ",
            pin_shots=True,
            clamped_start=True,
            sampler="unipc",
        ),
        network="5B",
        source="Efficient-Large-Model/LongLive-2.0-5B: model_bf16.pt, its LoRA merged",
        weights="generator",
        file_names=("longlive-2", "longlive2", "longlive_2"),
        height=704,
        width=1280,
        fps=24,
    ),
    "infinity-rope": Family(
        # A cut puts the chunk, in slots 3 to 5 of the window, at 45 to 47.
        RolloutConfig(local_attention_frames=6, sink_frames=1, rope_mode="window", shot_rope_offset=42),
        source="gdhe17/Self-Forcing: checkpoints/self_forcing_dmd.pt, used as it is",
        file_names=("infinity-rope", "infinity_rope"),
        licence="apache-2.0",
    ),
    "reward-forcing": Family(
        RolloutConfig(local_attention_frames=9, sink_frames=3, rope_mode="window", sink_ema=0.999),
        source="JaydenLu666/Reward-Forcing-T2V-1.3B",
        file_names=("reward-forcing", "reward_forcing", "rewardforcing"),
        licence="apache-2.0",
    ),
    "lingbot-world": _WORLD,
    "lingbot-world-2": _WORLD_2,
    "lingbot-world-2-1.3b": _WORLD_2.replace(
        network="1.3B world", source="LingBot-World 2.0, 1.3B: the shards at its root"
    ),
    "rolling-forcing": Family(
        RolloutConfig(denoising_timesteps=(1000, 800, 600, 400, 200), local_attention_frames=24),
        source="TencentARC/RollingForcing",
        file_names=("rolling_forcing", "rolling-forcing", "rollingforcing"),
        lacks=(_JOINT,),
    ),
    "causal-forcing-long": Family(
        RolloutConfig(denoising_timesteps=(1000, 800, 600, 400, 200), local_attention_frames=24),
        source="zhuhz22/Causal-Forcing: chunkwise/longvideo.pt",
        weights="generator",
        file_names=("longvideo", "chunkwise/longvideo"),
        licence="apache-2.0",
        lacks=(_JOINT,),
    ),
}
"""Family name -> description. Those with `lacks` are listed so that the error for their files states the reason."""


def available() -> list[str]:
    """List the names of the families that can run."""
    return [name for name, release in FAMILIES.items() if not release.lacks]


def find_family(family: str) -> Family:
    """Return the description of a family.

    Raises:
        ValueError: if it is unknown, or needs a mechanism that is not implemented; the message names it.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, expected one of {', '.join(available())}")
    release = FAMILIES[family]
    if release.lacks:
        raise ValueError(
            f"family {family!r} is known but cannot run: it needs {' and '.join(release.lacks)}. Families that run: "
            f"{', '.join(available())}"
        )
    return release


_RENAMED = {"PRESETS": "FAMILIES", "Preset": "Family", "find_preset": "find_family"}  # names of version 0.1


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} was renamed: use {_RENAMED[name]} instead", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
