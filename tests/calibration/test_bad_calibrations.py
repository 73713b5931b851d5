"""Bad input of a calibration, through the pipeline: every case ends in an error that names it and says what to do."""

import pytest
import torch

from qarvd_diffusers import ARVDPipeline, QARVDConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))


def config(scheme="w4a8", **options):
    options = {
        "calibration_prompts": ("a green triangle",),
        "calibration_chunks": 2,
        "outlier_alignment": 4,
        **options,
    }
    return QARVDConfig(scheme, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_prompts_that_are_all_the_same():
    with pytest.raises(ValueError, match=r"calibration_prompts is .*all of them are the same: one is enough"):
        config(calibration_prompts=("a red circle", "a red circle"))
    config(calibration_prompts=("a red circle",))


def test_a_chunk_that_is_never_reached(tiny_pipeline, monkeypatch):
    stream = tiny_pipeline.stream
    monkeypatch.setattr(tiny_pipeline, "stream", lambda num_chunks, **options: stream(num_chunks=1, **options))
    with pytest.raises(ValueError, match=r"never reached chunks \[1\], only \[0\]: generate as many chunks as"):
        tiny_pipeline.calibrate(config())


def test_a_layer_that_is_never_called(tiny_pipeline):
    tiny_pipeline.transformer.blocks[0].register_module("spare", torch.nn.Linear(24, 24))
    with pytest.raises(
        ValueError, match=r"blocks.0.spare was never called in 10 .*passes: add it to modules_to_not_convert"
    ):
        tiny_pipeline.calibrate(config())
    tiny_pipeline.calibrate(config(modules_to_not_convert=("spare",)))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16", "w8a8_dynamic"])
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_row_of_one_value_is_quantized_exactly(tiny_pipeline, scheme, value):
    """No error: zeros, or one value, are on any grid (rounding may move a value to compensate its neighbours)."""
    linear = tiny_pipeline.transformer.blocks[0].ffn.net[0].proj
    linear.weight.data[3] = value
    result = tiny_pipeline.calibrate(config(scheme, rounding="nearest"))
    got = result.layers["blocks.0.ffn.net.0.proj"].weight(torch.float32)[3]
    torch.testing.assert_close(got, torch.full_like(got, value), rtol=1e-5, atol=0)
    rounded = tiny_pipeline.calibrate(config(scheme))
    got = rounded.layers["blocks.0.ffn.net.0.proj"].weight(torch.float32)[3]
    torch.testing.assert_close(got, torch.full_like(got, value), rtol=1e-2, atol=0)


def test_activations_with_nan_leave_the_resume_folder_usable(tiny_pipeline, tmp_path):
    want = tiny_pipeline.calibrate(config(), use_cache=False).save(tmp_path / "want").read_bytes()
    run_pass, passes = tiny_pipeline.run_pass, []

    def failing(latents, *args, **kwargs):
        passes.append(1)  # ten passes for channels, ten for ranges, and six of rounding
        return run_pass(latents * torch.nan if len(passes) == 26 else latents, *args, **kwargs)

    tiny_pipeline.run_pass = failing
    with pytest.raises(ValueError, match=r"holds NaN or infinity in chunk 1, denoise pass, step 0"):
        tiny_pipeline.calibrate(config(), use_cache=False, resume=tmp_path / "parts")
    assert "ranges.safetensors" in files(tmp_path / "parts")
    tiny_pipeline.run_pass = run_pass
    got = tiny_pipeline.calibrate(config(), use_cache=False, resume=tmp_path / "parts").save(tmp_path / "got")
    assert got.read_bytes() == want


def test_a_resume_folder_of_something_else(tiny_pipeline, tmp_path):
    done = tiny_pipeline.calibrate(config(), use_cache=False, resume=tmp_path / "parts")
    before = files(tmp_path / "parts")
    for other in (
        config("w8a8"),
        config(calibration_seed=1),
        config(calibration_prompts=("a red square",)),
    ):
        with pytest.raises(ValueError, match="holds a calibration of another model, config or prompts"):
            tiny_pipeline.calibrate(other, use_cache=False, resume=tmp_path / "parts")
    changed = ARVDPipeline(**tiny_pipeline.components, height=32, width=48, max_sequence_length=12)
    changed.transformer.proj_out.bias.data += 1
    with pytest.raises(ValueError, match="holds a calibration of another model, config or prompts"):
        changed.calibrate(config(), use_cache=False, resume=tmp_path / "parts")
    changed.transformer.proj_out.bias.data -= 1
    assert files(tmp_path / "parts") == before and done.layers


def test_a_full_disk_is_named_and_the_resume_folder_stays_usable(tiny_pipeline, tmp_path):
    resource = pytest.importorskip(
        "resource", reason="run it on Linux or macOS"
    )  # a limit on file sizes stands in for the full disk
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    want = tiny_pipeline.calibrate(config(), use_cache=False).save(tmp_path / "want").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"ranges.safetensors could not be written .*free some space"):
            tiny_pipeline.calibrate(config(), use_cache=False, resume=tmp_path / "parts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    got = tiny_pipeline.calibrate(config(), use_cache=False, resume=tmp_path / "parts").save(tmp_path / "got")
    assert got.read_bytes() == want
