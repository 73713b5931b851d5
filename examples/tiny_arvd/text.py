"""The word-level tokenizer and the small UMT5 encoder."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from qarvd_diffusers.evaluation.moving_shapes import vocabulary

MAX_SEQUENCE_LENGTH = 24


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the grammar, lower-cased, `</s>` appended."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=64,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        dropout_rate=0.0,
        relative_attention_max_distance=32,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> torch.Tensor:
    """int64 [N, 24]."""
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt"
    ).input_ids


def encode(text_encoder: UMT5EncoderModel, ids: torch.Tensor) -> torch.Tensor:
    """[N, 24, d_model]; rows beyond the prompt are zero."""
    mask = ids != 0
    hidden = text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return hidden.float() * mask[..., None]
