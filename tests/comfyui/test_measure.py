"""Saved states and the nodes that measure, against the library itself."""

from __future__ import annotations

import json
import shutil

import imageio.v3 as imageio
import numpy as np
import pytest
from graphs import BUNDLED, PROMPT, node, quantize_graph, read_video, second_stream, stream_graph

from qarvd_diffusers import ARVDPipeline, QARVDConfig, bundled_model_path, measure_sensitivity
from qarvd_diffusers.memory.plan import choose
from qarvd_diffusers.memory.shapes import ModelShapes

pytestmark = pytest.mark.slow

SQUARE = "a small blue square moving right on a white background"


def expect_two_lines(message: str, problem: str, remedy: str) -> None:
    lines = message.strip().splitlines()
    assert len(lines) == 2, message
    assert problem in lines[0] and remedy in lines[1], message


def states(server):
    return server.base / "output" / "qarvd_states"


def saving(name: str, chunks: int = 1, **options) -> dict:
    graph = stream_graph(chunks=chunks, seed=60, preview="off")
    graph["7"] = node("QARVDSaveState", state=["3", 3], name=name, **options)
    return graph


def going_on(name: str) -> dict:
    graph = stream_graph(chunks=1, seed=0, preview="off", state=["7", 0])
    graph["7"] = node("QARVDLoadState", name=name)
    return graph


def test_a_saved_state_continues_as_if_never_saved(server):
    """In the node and, from the same file, in Python."""
    run = server.run(saving("shots/first"))
    assert run.status == "success", run.error
    assert "continues exactly" in run.text("7")
    shown = server.get("/object_info/QARVDLoadState")["QARVDLoadState"]["input"]["required"]["name"]
    assert "shots/first" in (shown[0] if isinstance(shown[0], list) else shown[1]["options"])
    server.stop()
    server.start()  # another process
    before = server.log.read_text().count("encodes the frames of the state again")
    run = server.run({**going_on("shots/first"), "8": node("PreviewImage", images=["3", 0])})
    assert run.status == "success", run.error
    assert server.log.read_text().count("encodes the frames of the state again") == before
    more = read_video(server.files(run, "4")[0])
    uncut = read_video(server.files(server.run(stream_graph(chunks=2, seed=60, preview="off")), "4")[0])
    assert more.shape == (12, 64, 64, 3) and np.abs(more.astype(int) - uncut[-12:]).mean() < 2
    pipe = ARVDPipeline.from_pretrained(bundled_model_path())
    stream = pipe.restore_stream(states(server) / "shots" / "first.safetensors", num_chunks=2, output_type="np")
    frames = (next(stream).frames[0] * 255).astype(int)  # ComfyUI truncates
    pictures = np.stack([imageio.imread(path) for path in server.files(run, "8")])
    assert np.abs(frames - pictures).max() <= 1


def test_a_state_is_not_replaced_unless_asked(server):
    graph = saving("twice")
    assert server.run(graph).status == "success"
    first = (states(server) / "twice.frames.safetensors").read_bytes()
    for overwrite, count in ((False, 2), (True, 2)):
        graph["3"]["inputs"]["seed"] += 1
        graph["7"]["inputs"]["overwrite"] = overwrite
        assert server.run(graph).status == "success"
        assert len(list(states(server).glob("twice*.frames.safetensors"))) == count
        assert ((states(server) / "twice.frames.safetensors").read_bytes() == first) is not overwrite


def test_states_that_cannot_be_loaded(server):
    assert server.run(saving("good")).status == "success"
    other = saving("other")
    other["3"]["inputs"]["kv_window"] = 9
    assert server.run(other).status == "success"
    for name, spoil, problem in (
        ("cut", lambda frames, exact: exact.write_bytes(exact.read_bytes()[:-1000]), "cut cannot be loaded"),
        ("gone", lambda frames, exact: exact.unlink(), "gone cannot be loaded"),
        ("mixed", lambda frames, exact: shutil.copy(states(server) / "other.safetensors", exact), "another state"),
        ("empty", lambda frames, exact: frames.write_bytes(b""), "empty cannot be loaded"),
    ):
        paths = [states(server) / f"{name}{suffix}" for suffix in (".frames.safetensors", ".safetensors")]
        for suffix, path in zip((".frames.safetensors", ".safetensors"), paths, strict=True):
            shutil.copy(states(server) / f"good{suffix}", path)
        spoil(*paths)
        expect_two_lines(server.run(going_on(name)).error, problem, "Save it again")
    status, body = server.post("/prompt", {"prompt": going_on("nowhere")})
    assert status == 400 and "There is no state 'nowhere'" in json.dumps(body)
    for name in ("../out", "x.frames", "con"):
        _, body = server.post("/prompt", {"prompt": saving(name)})  # the stream alone may run
        assert body["node_errors"]["7"]["errors"], name


def prompts(*texts: str) -> dict:
    return node("QARVDCalibrationPrompts", text="\n".join(texts), count=0, seed=0)


def test_evaluate_shows_tables_and_plots_of_the_library(server):
    graph = {name: entry for name, entry in quantize_graph("w8a8_dynamic").items() if name != "13"}
    graph["20"] = prompts(PROMPT, SQUARE)
    graph["21"] = node(
        "QARVDEvaluate", reference=["11", 0], pipeline=["12", 0], prompts=["20", 0], num_chunks=2, name="trial/one"
    )
    graph["22"] = node("PreviewImage", images=["21", 0])
    run = server.run(graph)
    assert run.status == "success", run.error
    folder = server.base / "output" / "qarvd_reports" / "trial" / "one"
    report = json.loads((folder / "report.json").read_text())
    assert (report["prompts"], report["num_chunks"], len(report["psnr_db"])) == (2, 2, 2)
    assert min(report["psnr_db"]) > 20
    assert f"{report['psnr_db'][1]:.2f}" in run.text("21")
    names = {entry["filename"] for entry in run.history["outputs"]["21"]["images"]}
    assert {"psnr_db.png", "ssim.png", "latent_mse.png"} <= names
    assert (folder / "report.html").stat().st_size > 10_000
    assert len(server.files(run, "22")) == len(names)
    graph["21"]["inputs"] |= {"reference": ["12", 0], "pipeline": ["11", 0]}
    expect_two_lines(server.run(graph).error, "reference is", "Connect Q-ARVD Load Pipeline")


def test_sensitivity_and_bits_are_those_of_the_library_and_quantize_takes_them(server):
    graph = {"11": node("QARVDLoadPipeline", model=BUNDLED), "20": prompts(PROMPT)}
    graph["21"] = node(
        "QARVDSensitivity", pipeline=["11", 0], prompts=["20", 0], calibration=["20", 0], scheme="w4a8_dynamic",
        num_chunks=2,
    )  # fmt: skip
    graph["22"] = node(
        "QARVDMixedPrecision", pipeline=["11", 0], scheme="w4a8_dynamic", budget=0.1, prompts=["20", 0],
        calibration=["20", 0], calibration_chunks=2,
    )  # fmt: skip
    graph["12"] = node(
        "QARVDQuantize", pipeline=["11", 0], scheme="w4a8_dynamic", calibration=["20", 0], calibration_chunks=2,
        rounding="nearest", sensitivity=["21", 0], bits=["22", 0],
    )  # fmt: skip
    graph["13"] = node("QARVDSaveQuantized", pipeline=["12", 0], name="measured")
    run = server.run(graph)
    assert run.status == "success", run.error
    pipe = ARVDPipeline.from_pretrained(bundled_model_path())
    config = QARVDConfig("w4a8_dynamic", calibration_prompts=(PROMPT,), calibration_chunks=2)
    expected = measure_sensitivity(pipe, config, (PROMPT,), num_chunks=2)
    rows = [line.split() for line in run.text("21").splitlines()]
    found = [float(row[1]) for row in rows if row and row[0] in ("1", "2")]
    assert found == pytest.approx(expected.sensitivity, rel=1e-2)
    saved = json.loads((server.base / "output/qarvd/measured/transformer/config.json").read_text())
    quantization = saved["quantization_config"]
    assert quantization["chunk_weights"] == pytest.approx(expected.chunk_weights, rel=1e-2)
    listed = run.text("22").splitlines()[1:]
    assert listed and set(quantization["module_bits"]) == set(listed)


def test_plan_counts_as_the_library_does(server):
    graph = {"11": node("QARVDLoadPipeline", model=BUNDLED, dtype="bfloat16")}
    graph["12"] = node("QARVDPlan", pipeline=["11", 0], memory="8GB", width=0, height=0)
    run = server.run(graph)
    assert run.status == "success", run.error
    expected = choose(ModelShapes.read(bundled_model_path()), "8GB")
    assert f"needs {expected.total / 1e9:.2f} GB of 8 GB" in run.text("12")
    assert expected.describe() in run.text("12")


def test_a_video_goes_on_from_a_loaded_state_and_is_saved_again(server):
    assert server.run(saving("chain")).status == "success"
    graph = going_on("chain")
    graph["8"] = node("QARVDSaveState", state=["3", 3], name="chain-2")
    graph |= second_stream(state=["3", 3])
    run = server.run(graph)
    assert run.status == "success", run.error
    assert "continues exactly" in run.text("8")
    assert len(read_video(server.files(run, "6")[0])) == 12
