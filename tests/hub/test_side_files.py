"""Cards and reports of other models: never a false statement, never a reason for a save to fail."""

import json
import logging

import pytest

from qarvd_diffusers import ARVDPipeline
from qarvd_diffusers.config import QARVDConfig
from qarvd_diffusers.hub.model_card import CARD_FILE, REPORT_FILE, model_card, owned_files, stated_licence

REPORT = {"num_chunks": 1, "prompts": 1, "seed": 0, "psnr_db": [99.99]}


@pytest.fixture
def quantized(tiny_pipeline):
    tiny_pipeline.quantize(QARVDConfig("w8a16"))
    return tiny_pipeline


@pytest.mark.parametrize(
    "header",
    ("license: [a, b]", "license: 7", "license: {a: 1}", "a: b: c", "tags: 1", "- x", "\0", "!!python/object:os.x"),
)
def test_a_readme_that_is_no_card_is_said_and_ignored(header, quantized, tmp_path, caplog):
    (tmp_path / CARD_FILE).write_text(f"---\n{header}\n---\ntext\n", encoding="utf-8")
    quantized.source = str(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert stated_licence(tmp_path) is None
        quantized.save_pretrained(tmp_path / "saved")
    assert header.startswith("tags") or str(tmp_path / CARD_FILE) in caplog.text
    assert "Not known" in (tmp_path / "saved" / CARD_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", ("", "[]", "{", "{}", '{"num_chunks": "1"}', json.dumps(REPORT | {"psnr_db": []}), "[" * 10**5, "\xff" * 4)
)
def test_a_damaged_report_is_said_and_left_out(text, quantized, tmp_path, caplog):
    (tmp_path / REPORT_FILE).write_bytes(text.encode("latin-1"))
    quantized.source = str(tmp_path)
    with caplog.at_level(logging.WARNING):
        quantized.save_pretrained(tmp_path / "saved")
    assert str(tmp_path / REPORT_FILE) in caplog.text and not (tmp_path / "saved" / REPORT_FILE).exists()
    assert "not measured" in (tmp_path / "saved" / CARD_FILE).read_text(encoding="utf-8")


def test_no_report_and_no_card_of_another_model_stays(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "float")
    (tmp_path / "float" / CARD_FILE).write_text("of the user\n")
    tiny_pipeline.quantize(QARVDConfig("w8a16"))
    tiny_pipeline.save_pretrained(tmp_path / "model", report=REPORT)
    assert owned_files(tmp_path / "model") == [REPORT_FILE, CARD_FILE]
    assert owned_files(tmp_path / "float") == [REPORT_FILE]
    tiny_pipeline.source = None
    tiny_pipeline.save_pretrained(tmp_path / "model")  # without a report: the old one speaks of other weights
    assert not (tmp_path / "model" / REPORT_FILE).exists()
    assert "99.99" not in (tmp_path / "model" / CARD_FILE).read_text()
    floating = ARVDPipeline.from_pretrained(tmp_path / "float")
    floating.source = None
    floating.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / CARD_FILE).exists(), "a card that says 'quantized' beside float weights"


def test_texts_of_a_checkpoint_are_shown_as_text():
    hostile = "x`](https://evil) <img src=x> | y\n# heading"
    config = QARVDConfig("w4a8", module_bits={"blocks.0": 8})
    config.module_bits[hostile] = 8
    sizes = {"quantized": 1, "bfloat16": 2, "total": 3}
    card = model_card(config, sizes, base_model=hostile, licence=hostile).content
    body = card.split("---", 2)[2]
    assert "<img" not in body and "\n# heading" not in body
