"""Original checkpoints, adapters and single files of causal Wan models <-> diffusers folders and names."""

from .checkpoint import load_checkpoint
from .convert import (
    PIPELINE_STUB,
    build_transformer,
    convert_checkpoint,
    export_checkpoint,
    infer_config,
    load_transformer_config,
)
from .lora import LoraLayer, check_fit, merge_lora, read_lora, to_peft
from .names import to_diffusers_keys, to_original_keys

__all__ = [
    "PIPELINE_STUB",
    "LoraLayer",
    "build_transformer",
    "check_fit",
    "convert_checkpoint",
    "export_checkpoint",
    "infer_config",
    "load_checkpoint",
    "load_transformer_config",
    "merge_lora",
    "read_lora",
    "to_diffusers_keys",
    "to_original_keys",
    "to_peft",
]
