"""Damaged or foreign files in the cache and in resume folders: a warning, and the calibration is made again."""

from __future__ import annotations

import logging

import pytest
import torch

from qarvd_diffusers import QARVDConfig
from qarvd_diffusers.calibration.pipeline import calibrate_pipeline
from qarvd_diffusers.quantization.result import CalibrationResult

CONFIG = QARVDConfig("w8a8", calibration_prompts=("a red circle",), calibration_chunks=1, outlier_alignment=4)


def same(one, other):
    return one.layers.keys() == other.layers.keys() and all(
        torch.equal(tensor, other.layers[name].tensors()[key])
        for name, layer in one.layers.items()
        for key, tensor in layer.tensors().items()
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def of_another_config(path):
    result = CalibrationResult.load(path)
    CalibrationResult(result.layers, "0" * 40).save(path)


def of_other_layers(path):
    result = CalibrationResult.load(path)
    layers = dict(result.layers)
    layers["elsewhere"] = layers.pop(next(iter(layers)))
    CalibrationResult(layers, result.config_hash).save(path)


def of_another_size(path):
    result = CalibrationResult.load(path)
    layers = dict(result.layers)
    first = next(iter(layers))
    layers[first] = next(
        layer for layer in layers.values() if layer.weight_scale.shape != layers[first].weight_scale.shape
    )
    CalibrationResult(layers, result.config_hash).save(path)


DAMAGES = [truncate, of_another_config, of_other_layers, of_another_size]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path))
    return tmp_path


def test_a_damaged_result_in_the_cache_is_calibrated_again(tiny_pipeline, cache, caplog):
    expected = calibrate_pipeline(tiny_pipeline, CONFIG)
    (path,) = (cache / "calibration").iterdir()
    content = path.read_bytes()
    for damage in DAMAGES:
        damage(path)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert same(calibrate_pipeline(tiny_pipeline, CONFIG), expected)
        assert path.name in caplog.text, damage
        assert path.read_bytes() == content


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_of_a_resume_folder_is_done_again(tiny_pipeline, tmp_path, caplog, damage):
    expected = calibrate_pipeline(tiny_pipeline, CONFIG, use_cache=False, resume=tmp_path)
    damage(tmp_path / "ranges.safetensors")
    with caplog.at_level(logging.WARNING):
        again = calibrate_pipeline(tiny_pipeline, CONFIG, use_cache=False, resume=tmp_path)
    assert same(again, expected)
    assert "ranges.safetensors" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"fingerprint": 3}', '{"fingerprint": null}', "[" * 100_000, "\xff"]
)
def test_a_damaged_manifest_is_refused_by_name(tiny_pipeline, cache, text):
    folder = cache / "resume"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"manifest\.json is not the manifest of a calibration"):
        calibrate_pipeline(tiny_pipeline, CONFIG, use_cache=False, resume=folder)


def test_a_damaged_manifest_in_the_cache_starts_over(tiny_pipeline, cache, caplog):
    expected = calibrate_pipeline(tiny_pipeline, CONFIG)
    (result,) = (cache / "calibration").iterdir()
    result.unlink()
    folder = cache / "unfinished" / result.stem
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert same(calibrate_pipeline(tiny_pipeline, CONFIG), expected)
    assert "manifest.json" in caplog.text
