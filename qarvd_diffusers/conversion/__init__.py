"""Convert original checkpoints, adapters and single files of causal Wan models to and from diffusers folders."""

from .checkpoint import LORA_NESTINGS, load_checkpoint, open_checkpoint
from .convert import convert_checkpoint, load_original
from .detect import Detected, detect_checkpoint
from .from_disk import quantize_folder
from .lora import LoraLayer, check_fit, merge_lora, read_lora
from .names import to_diffusers_keys, to_original_keys
from .network import infer_config, load_transformer_config
from .peft import to_peft
from .single_file import (
    export_checkpoint,
    export_int8_tensorwise,
    folder_to_single_file,
    save_single_file,
    single_file_to_folder,
)

__all__ = [
    "LORA_NESTINGS",
    "Detected",
    "LoraLayer",
    "check_fit",
    "convert_checkpoint",
    "detect_checkpoint",
    "export_checkpoint",
    "export_int8_tensorwise",
    "folder_to_single_file",
    "infer_config",
    "load_checkpoint",
    "load_original",
    "load_transformer_config",
    "merge_lora",
    "open_checkpoint",
    "quantize_folder",
    "read_lora",
    "save_single_file",
    "single_file_to_folder",
    "to_diffusers_keys",
    "to_original_keys",
    "to_peft",
]
