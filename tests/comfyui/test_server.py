"""The nodes on a real ComfyUI server, through the same HTTP and websocket interface as the browser."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from graphs import BUNDLED, PROMPT, node, quantize_graph, read_video, stream_graph
from safetensors.torch import load_file, save_file
from workflows import widget_names

from qarvd_diffusers import ARVDPipeline, QARVDConfig, bundled_model_path, to_original_keys
from qarvd_diffusers.evaluation.moving_shapes import adherence

pytestmark = pytest.mark.slow

NODES = {
    "QARVDLoadPipeline",
    "QARVDLoadQuantized",
    "QARVDCalibrationPrompts",
    "QARVDQuantize",
    "QARVDSaveQuantized",
    "QARVDEncodePrompt",
    "QARVDPromptSchedule",
    "QARVDLora",
    "QARVDSaveState",
    "QARVDLoadState",
    "QARVDEvaluate",
    "QARVDSensitivity",
    "QARVDMixedPrecision",
    "QARVDPlan",
    "QARVDLoadDiffusionModel",
    "QARVDStreamGenerate",
    "QARVDCompare",
    "QARVDInfo",
    "QARVDToModel",
    "QARVDDecode",
}


# Saved workflows hold values of widgets by position: new widgets may only be added at the end. None: what happens to
# a seed after a run.
WIDGETS_OF_0_1 = {
    "QARVDStreamGenerate": "num_chunks seed None width height preview fps timesteps kv_window sink kv_cache",
    "QARVDQuantize": "scheme frame_weighting outlier_split rounding iterations calibration_chunks exclude_layers seed "
    "None rounding_inputs",
    "QARVDCalibrationPrompts": "text count seed None",
    "QARVDSaveQuantized": "name format overwrite",
    "QARVDLoadPipeline": "model dtype rollout base",
    "QARVDLoadQuantized": "checkpoint dtype",
    "QARVDEncodePrompt": "text",
    "QARVDCompare": "label_a label_b latent_frames_per_chunk",
}


@pytest.fixture(scope="module")
def quantized(server):
    """Name of a quantized model saved on the server."""
    run = server.run(quantize_graph(name="tiny-w8a16"))
    assert run.status == "success", run.error
    return "tiny-w8a16"


def expect_two_lines(message: str, problem: str, remedy: str) -> None:
    lines = message.strip().splitlines()
    assert len(lines) == 2, message
    assert problem in lines[0] and remedy in lines[1], message


def test_all_nodes_are_there_and_documented(server, nodes):
    assert set(nodes) >= NODES
    for name in NODES:
        info = nodes[name]
        assert info["description"] and info["display_name"].startswith("Q-ARVD")
        assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"]), name
        for kind in ("required", "optional"):
            for input_name, spec in info["input"].get(kind, {}).items():
                assert spec[1].get("tooltip"), (name, input_name)


@pytest.mark.parametrize("name", list(WIDGETS_OF_0_1))
def test_widgets_of_0_1_keep_their_places(nodes, name):
    expected = WIDGETS_OF_0_1[name].split()
    assert list(map(str, widget_names(nodes[name])))[: len(expected)] == expected


def test_stream_makes_a_video_that_shows_the_prompt(server):
    """One event per chunk while the run goes on, 9 + 12 + 12 frames, not black, and a red circle that moves left."""
    run = server.run(stream_graph(chunks=3))
    assert run.status == "success", run.error
    video = read_video(server.files(run, "4")[0])
    assert video.shape == (33, 64, 64, 3)
    assert video.mean() > 10 and video.std() > 10
    assert adherence(video, PROMPT).correct
    chunks = run.of("qarvd.chunk")
    assert [chunk["index"] for chunk in chunks] == [0, 1, 2]
    assert [chunk["frames"] for chunk in chunks] == [9, 12, 12]
    kinds = [kind for _, kind, data in run.messages if kind in ("progress", "qarvd.chunk")]
    assert kinds.index("qarvd.chunk") < len(kinds) - 1 - kinds[::-1].index("progress"), "chunks come before the end"
    for chunk in chunks:
        file = server.base / "temp" / chunk["subfolder"] / chunk["filename"]
        assert len(read_video(file)) == chunk["frames"]
    outputs = run.history["outputs"]["3"]
    assert len(outputs["qarvd_chunks"]) == 3


def test_images_are_those_of_the_python_pipeline(server):
    """The node draws the same noise as `ARVDPipeline.stream` with the same seed."""
    run = server.run(stream_graph(chunks=1, seed=5, preview="off"))
    video = read_video(server.files(run, "4")[0])
    pipe = ARVDPipeline.from_pretrained(bundled_model_path())
    frames = pipe(PROMPT, num_chunks=1, generator=torch.Generator().manual_seed(5)).frames[0]
    # H.264 in 4:2:0 stands between: colour edges smear.
    assert np.abs(video - frames * 255.0).mean() < 6
    assert not run.of("qarvd.chunk")


def test_equal_settings_are_cached_and_a_changed_one_runs(server):
    graph = stream_graph(chunks=1, seed=11)
    first, again = server.run(graph), server.run(graph)
    assert first.of("qarvd.chunk") != [] and again.of("qarvd.chunk") == []
    assert {"1", "2", "3", "4"} <= again.cached()
    changed = server.run(stream_graph(chunks=1, seed=12))
    assert changed.of("qarvd.chunk") and {"1", "2"} <= changed.cached() and "3" not in changed.cached()
    a, b = (read_video(server.files(run, "4")[0]) for run in (first, changed))
    assert np.abs(a.astype(int) - b).mean() > 1


def saved_latent(run):
    return run.history["outputs"]["5"]["latents"][0]


def test_quantize_leaves_its_input_float_and_the_saved_model_is_the_libraries(server):
    """Bit for bit what `pipe.quantize` and `save_pretrained` write; the float pipeline still streams as before."""
    saver = {"5": node("SaveLatent", samples=["3", 1], filename_prefix="latents/same")}
    before = server.run({**stream_graph(chunks=1, seed=21), **saver})
    graph = quantize_graph("w8a8_dynamic", "same", exclude_layers="blocks.0")
    run = server.run(
        {**graph, "14": node("QARVDInfo", pipeline=["12", 0]), "15": node("QARVDInfo", pipeline=["11", 0])}
    )
    assert run.status == "success", run.error
    assert "w8a8_dynamic" in run.text("14") and "float" in run.text("15")
    pipe = ARVDPipeline.from_pretrained(bundled_model_path())
    pipe.quantize(QARVDConfig("w8a8_dynamic", modules_to_not_convert=("blocks.0",)))
    expected = pipe.transformer.state_dict()
    loaded = ARVDPipeline.from_pretrained(server.base / "output" / "qarvd" / "same").transformer.state_dict()
    assert expected.keys() == loaded.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == loaded[name].dtype and torch.equal(tensor, loaded[name]), name
    after = server.run({**stream_graph(chunks=1, seed=21, preview="off"), **saver})
    files = [
        server.base / "output" / entry["subfolder"] / entry["filename"] for entry in map(saved_latent, (before, after))
    ]
    a, b = (load_file(path)["latent_tensor"] for path in files)
    torch.testing.assert_close(
        a, b, atol=1e-3, rtol=0
    )  # float sums vary in the last bit; quantization moves it by 0.02
    # The other way round: what the library saved, the node loads and streams.
    pipe.save_pretrained(server.base / "models" / "qarvd" / "from-library")
    run = server.run(stream_graph(node("QARVDLoadQuantized", checkpoint="from-library"), chunks=1))
    assert run.status == "success", run.error


def test_single_files_and_rollouts(server):
    """A file of ours and an original checkpoint, which is converted once; either can roll out like another member."""
    models = server.base / "models" / "qarvd"
    pipe = ARVDPipeline.from_pretrained(bundled_model_path())
    pipe.save_pretrained(models / "lender")
    pipe.save_single_file(models / "ours.safetensors")
    original = {k: v.contiguous() for k, v in to_original_keys(pipe.transformer.state_dict()).items()}
    save_file(original, models / "tiny_self_forcing.safetensors")
    for file, rollout, expected in (
        (
            "ours.safetensors",
            "as saved",
            f"steps {', '.join(f'{t:g}' for t in pipe.rollout_config.denoising_timesteps)}",
        ),
        ("ours.safetensors", "infinity-rope", "attention over 6 latent frames, 1 of them a sink"),
        ("tiny_self_forcing.safetensors", "as saved", "attention over all latent frames"),
        ("tiny_self_forcing.safetensors", "longlive", "a base and a LoRA"),
    ):
        source = node("QARVDLoadPipeline", model=file, rollout=rollout, base="lender")
        graph = stream_graph(source, chunks=1, width=64, height=64)
        run = server.run({**graph, "9": node("QARVDInfo", pipeline=["1", 0])})
        assert expected in (run.error if "LoRA" in expected else run.text("9"))
    converted = (server.base / "output" / "qarvd" / ".converted").glob("*/tiny_self_forcing/model_index.json")
    assert len(list(converted)) == 1


def test_calibration_runs_with_the_given_prompts_and_reports(server):
    graph = quantize_graph("w4a8", "calibrated", calibration_chunks=1)
    graph["10"] = node(
        "QARVDCalibrationPrompts",
        text=f"# two\n{PROMPT}\n\na small green square pulsing on a white background",
        count=0,
        seed=0,
    )
    graph["12"]["inputs"]["calibration"] = ["10", 0]
    run = server.run(graph)
    assert run.status == "success", run.error
    progress = [data for data in run.of("progress") if data["node"] == "12"]
    assert len(progress) > 10
    shown = [data["text"] for data in run.of("text") if data["node"] == "12"]
    assert len(shown) > 2 and all(text.endswith(")") for text in shown[:-1]), "stages while it works"
    assert re.fullmatch(r"\d\.\d\d MB\nquantized layers \d\.\d\d MB, 0\.3\d\d of bfloat16", shown[-1])
    assert shown[-1] in run.text("13"), "at the end what came out"
    assert "w4a8, rounding gptq" in run.text("13")
    folder = server.base / "output" / "qarvd" / "calibrated"
    stored = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert stored["calibration_chunks"] == 1 and stored["calibration_prompts"] is None


def test_a_saved_again_checkpoint_is_loaded_again(server):
    """Same name, other content: the loader must not hand out the old model."""
    server.run(quantize_graph("w8a16", "again"))
    graph = {"1": node("QARVDLoadQuantized", checkpoint="again"), "2": node("QARVDInfo", pipeline=["1", 0])}
    assert "w8a16" in server.run(graph).text("2")
    server.run(quantize_graph("w4a16", "again", rounding="nearest"))
    assert "w4a16" in server.run(graph).text("2")


def test_interrupt_is_answered_within_a_chunk_and_the_next_job_runs(server):
    import time

    run = server.submit(stream_graph(chunks=40, seed=31))
    while not run.of("qarvd.chunk"):
        time.sleep(0.05)
    server.post("/interrupt", {})
    made = len(run.of("qarvd.chunk"))
    server.wait(run)
    assert run.of("execution_interrupted")
    assert len(run.of("qarvd.chunk")) <= made + 2, "the one in progress, and one whose message was on its way"
    assert server.run(stream_graph(chunks=1, seed=32)).status == "success"


def test_a_quantization_can_be_interrupted(server):
    import time

    run = server.submit(quantize_graph("w8a8", "never", seed=77))
    while not [data for data in run.of("progress") if data["node"] == "12" and data["value"] > 3]:
        time.sleep(0.05)
    server.post("/interrupt", {})
    server.wait(run)
    assert run.of("execution_interrupted")
    progress = [data for data in run.of("progress") if data["node"] == "12"]
    assert max(data["value"] for data in progress) < progress[0]["max"], "long before the end"
    assert not (server.base / "output" / "qarvd" / "never").exists()


class TestBadInput:
    """The first line says what is wrong, the second what to do; the server stays up."""

    def test_resolution(self, server):
        run = server.run(stream_graph(width=72, chunks=1))
        expect_two_lines(run.error, "width is 72", "Set width to 64")

    def test_float_checkpoint(self, server):
        ARVDPipeline.from_pretrained(bundled_model_path()).save_pretrained(server.base / "models" / "qarvd" / "float")
        graph = {"1": node("QARVDLoadQuantized", checkpoint="float"), "2": node("QARVDInfo", pipeline=["1", 0])}
        status, body = server.post("/prompt", {"prompt": graph})
        assert status == 400
        details = body["node_errors"]["1"]["errors"][0]["details"]
        assert "float is a float model" in details and "Q-ARVD Quantize" in details

    def test_unknown_checkpoint(self, server):
        graph = {"1": node("QARVDLoadQuantized", checkpoint="nothing"), "2": node("QARVDInfo", pipeline=["1", 0])}
        status, body = server.post("/prompt", {"prompt": graph})
        assert status == 400 and "There is no model 'nothing'" in json.dumps(body)

    def test_other_architecture(self, server):
        folder = server.base / "models" / "qarvd" / "flux"
        (folder / "transformer").mkdir(parents=True)
        (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        (folder / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
        graph = {"1": node("QARVDLoadPipeline", model="flux"), "2": node("QARVDInfo", pipeline=["1", 0])}
        expect_two_lines(server.run(graph).error, "flux is a FluxPipeline", "Self-Forcing family")

    def test_damaged_checkpoint(self, server, quantized):
        folder = server.base / "models" / "qarvd" / "damaged"
        shutil.copytree(server.base / "output" / "qarvd" / quantized, folder)
        file = next((folder / "transformer").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:1000])
        graph = {"1": node("QARVDLoadQuantized", checkpoint="damaged"), "2": node("QARVDInfo", pipeline=["1", 0])}
        expect_two_lines(server.run(graph).error, "damaged cannot be loaded", "copy or save the model again")

    def test_quantized_twice(self, server):
        graph = quantize_graph(name="twice")
        graph["16"] = node("QARVDQuantize", pipeline=["12", 0], scheme="w4a16")
        graph["13"]["inputs"]["pipeline"] = ["16", 0]
        expect_two_lines(server.run(graph).error, "is quantized already", "Connect a float pipeline")

    def test_path_outside_the_output_folder(self, server):
        status, body = server.post("/prompt", {"prompt": quantize_graph(name="../../x")})
        assert status == 400 and "is not inside" in json.dumps(body) and "plain name" in json.dumps(body)

    def test_no_calibration_prompt(self, server):
        graph = quantize_graph("w8a8", "x")
        graph["10"] = node("QARVDCalibrationPrompts", text="# nothing", count=0, seed=0)
        graph["12"]["inputs"]["calibration"] = ["10", 0]
        expect_two_lines(server.run(graph).error, "no calibration prompt", "one prompt per line")

    def test_nan_is_named_by_file_and_tensor(self, server):
        pipe = ARVDPipeline.from_pretrained(bundled_model_path())
        with torch.no_grad():
            pipe.transformer.proj_out.bias.fill_(float("nan"))
        pipe.save_pretrained(server.base / "models" / "qarvd" / "nan")
        run = server.run(stream_graph(node("QARVDLoadPipeline", model="nan"), chunks=1))
        expect_two_lines(run.error, "proj_out.bias holds nan", "copy or save the model again")

    def test_the_next_job_still_runs(self, server):
        graph = {"1": node("QARVDLoadPipeline", model=BUNDLED), "2": node("QARVDInfo", pipeline=["1", 0])}
        assert server.run(graph).status == "success"
