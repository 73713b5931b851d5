"""The licence goes where the weights go: into converted and quantized folders, and it is flagged before upload."""

from __future__ import annotations

import logging

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.conversion import convert_checkpoint, detect_checkpoint, to_original_keys
from qarvd_diffusers.hub import publish
from qarvd_diffusers.hub.model_card import is_non_commercial


@pytest.fixture
def checkpoint(tiny_pipeline, tmp_path):
    path = tmp_path / "release" / "model.safetensors"
    path.parent.mkdir()
    save_file({k: v.detach() for k, v in to_original_keys(tiny_pipeline.transformer.state_dict()).items()}, path)
    return path


def card(folder):
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("cc-by-nc-sa-4.0", True),
        ("cc-by-nc-4.0", True),
        ("apache-2.0", False),
        ("mit", False),
        (None, False),
        ("encore", False),
        ("tencent-academic", True),
        ("Some terms (non-commercial)", True),
    ],
)
def test_non_commercial(licence, expected):
    assert is_non_commercial(licence) is expected


@pytest.mark.parametrize(
    ("family", "stated", "licence"),
    [
        ("causvid", None, "cc-by-nc-sa-4.0"),
        ("self-forcing", None, "apache-2.0"),
        ("causal-forcing", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("longlive", None, None),
    ],
)
def test_from_release_to_quantized_folder(checkpoint, tmp_path, family, stated, licence):
    if stated is not None:
        (checkpoint.parent / "README.md").write_text(f"---\nlicense: {stated}\n---\n# A release\n")
    assert detect_checkpoint(checkpoint, family).licence == licence
    out = convert_checkpoint(checkpoint, tmp_path / "float", family, lora="none", num_attention_heads=2)
    assert card(out).data.license == licence
    pipe = ARVDPipeline.from_pretrained(out, dtype=torch.float32)
    pipe.save_pretrained(tmp_path / "copy")
    assert card(tmp_path / "copy").data.license == licence
    pipe.quantize(QARVDConfig("w8a16"))
    pipe.save_pretrained(tmp_path / "quantized")
    assert card(tmp_path / "quantized").data.license == licence
    text = str(card(tmp_path / "quantized"))
    assert ("**Non-commercial**" in text) == is_non_commercial(licence)
    assert ("non-commercial" in card(tmp_path / "quantized").data.tags) == is_non_commercial(licence)


def test_readme_without_a_card(checkpoint):
    (checkpoint.parent / "README.md").write_text("# Just text\n")
    assert detect_checkpoint(checkpoint, "self-forcing").licence == "apache-2.0"


class NoHub(Exception):
    pass


@pytest.fixture
def no_hub(monkeypatch):
    """What is said comes before the Hub is asked for anything: here there is no Hub at all."""

    def refuse(*args, **kwargs):
        raise NoHub

    monkeypatch.setattr(publish, "HfApi", refuse)


def released(checkpoint, tmp_path, family):
    out = convert_checkpoint(checkpoint, tmp_path / "float", family, lora="none", num_attention_heads=2)
    return ARVDPipeline.from_pretrained(out, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "accepted", "flag"),
    [
        ("causvid", True, "licensed cc-by-nc-sa-4.0: non-commercial"),
        ("longlive", False, "No licence is known"),
        ("self-forcing", False, None),
    ],
)
def test_flagged_before_upload(checkpoint, tmp_path, caplog, no_hub, family, accepted, flag):
    pipe = released(checkpoint, tmp_path, family)
    with caplog.at_level(logging.WARNING, logger="qarvd_diffusers"), pytest.raises(NoHub):
        pipe.push_to_hub("user/model", accept_licence=accepted)
    flags = [record.message for record in caplog.records if "user/model" in record.message]
    assert (flag in flags[0]) if flag else not flags


def test_refused_without_an_explicit_yes(checkpoint, tmp_path, no_hub):
    """Float or quantized, and before anything is written."""
    pipe = released(checkpoint, tmp_path, "causvid")
    message = "user/model are licensed cc-by-nc-sa-4.0: non-commercial.* pass accept_licence=True"
    with pytest.raises(ValueError, match=message):
        pipe.push_to_hub("user/model")
    with pytest.raises(ValueError, match=message):
        pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="user/model")
    assert not (tmp_path / "saved").exists()
    pipe.quantize(QARVDConfig("w8a16"))
    with pytest.raises(ValueError, match=message):
        pipe.push_to_hub("user/model")
    with pytest.raises(NoHub):
        pipe.push_to_hub("user/model", accept_licence=True)
