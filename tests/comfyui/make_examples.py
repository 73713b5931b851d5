"""Writes `example_workflows/*.json` from the graphs below, with the input order that a running ComfyUI tells.

COMFYUI_PATH=... python tests/comfyui/make_examples.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import comfy_server
import workflows
from graphs import BUNDLED, PROMPT, node

CALIBRATION = """a large red circle moving right on a white background
a small green square circling clockwise on a black background
a large yellow triangle pulsing on a navy background
a small cyan ring moving up on a gray background
a small magenta cross moving left on a white background
a large blue circle staying still on a black background"""
MOVING = "a large yellow circle moving right on a navy background"

QUANTIZE = {
    "1": node("QARVDLoadPipeline", model=BUNDLED),
    "2": node("QARVDCalibrationPrompts", text=CALIBRATION, count=0, seed=0),
    "3": node("QARVDQuantize", pipeline=["1", 0], calibration=["2", 0], scheme="w4a8", calibration_chunks=3),
    "4": node("QARVDSaveQuantized", pipeline=["3", 0], name="tiny-w4a8"),
    "5": node("QARVDInfo", pipeline=["3", 0]),
}
STREAM = {
    "1": node("QARVDLoadQuantized", checkpoint="tiny-w4a8"),
    "2": node("QARVDEncodePrompt", pipeline=["1", 0], text=PROMPT),
    "3": node("QARVDStreamGenerate", pipeline=["1", 0], positive=["2", 0], num_chunks=7, seed=0),
    "4": node("SaveVideo", video=["3", 2], filename_prefix="video/stream", format="auto", codec="auto"),
}
IMAGE_TO_VIDEO = {
    "1": node("QARVDLoadPipeline", model=BUNDLED),
    "2": node("QARVDEncodePrompt", pipeline=["1", 0], text=MOVING),
    "3": node("QARVDStreamGenerate", pipeline=["1", 0], positive=["2", 0], num_chunks=1, seed=0, preview="off"),
    "4": node("PreviewImage", images=["3", 0]),
    "5": node("QARVDStreamGenerate", pipeline=["1", 0], positive=["2", 0], start_image=["3", 0], num_chunks=6, seed=1),
    "6": node("SaveVideo", video=["5", 2], filename_prefix="video/image_to_video", format="auto", codec="auto"),
}
COMPARE = {
    "1": node("QARVDLoadPipeline", model=BUNDLED),
    "2": node("QARVDCalibrationPrompts", text=CALIBRATION, count=0, seed=0),
    "3": node("QARVDQuantize", pipeline=["1", 0], calibration=["2", 0], scheme="w4a8", calibration_chunks=3),
    "4": node(
        "QARVDEncodePrompt", pipeline=["1", 0], text="a large cyan ring circling clockwise on a gray background"
    ),
    "5": node("QARVDStreamGenerate", pipeline=["1", 0], positive=["4", 0], num_chunks=4, seed=3),
    "6": node("QARVDStreamGenerate", pipeline=["3", 0], positive=["4", 0], num_chunks=4, seed=3),
    "7": node("QARVDCompare", images_a=["5", 0], images_b=["6", 0], label_a="float32", label_b="w4a8"),
    "8": node("CreateVideo", images=["7", 0], fps=16.0),
    "9": node("SaveVideo", video=["8", 0], filename_prefix="video/compare", format="auto", codec="auto"),
}

# name -> graph, places (x, y, width, height), note
EXAMPLES = {
    "quantize": (
        QUANTIZE,
        {
            "1": (0, 0, 330, 130),
            "2": (0, 200, 330, 260),
            "3": (390, 0, 330, 330),
            "4": (780, 0, 380, 260),
            "5": (780, 320, 380, 330),
            "note": (0, 520, 330, 190),
        },
        "### Quantize and save\n\nCalibrates the small model that ships with the library on six prompts, quantizes it to 4-bit "
        "weights and 8-bit activations, and saves it as `output/qarvd/tiny-w4a8`.\n\nThen open **stream**.",
    ),
    "stream": (
        STREAM,
        {
            "1": (0, 0, 330, 130),
            "2": (0, 190, 330, 180),
            "3": (390, 0, 400, 700),
            "4": (850, 0, 400, 460),
            "note": (0, 430, 330, 190),
        },
        "### Stream from a quantized model\n\nEvery finished chunk plays in **Stream Generate** while the next one is made.\n\n"
        "Needs `tiny-w4a8`: run the workflow **quantize** once.",
    ),
    "image_to_video": (
        IMAGE_TO_VIDEO,
        {
            "1": (0, 0, 330, 130),
            "2": (0, 190, 330, 180),
            "3": (390, 0, 330, 620),
            "4": (780, 0, 330, 330),
            "5": (1170, 0, 400, 700),
            "6": (1630, 0, 400, 460),
            "note": (0, 430, 330, 230),
        },
        "### Image to video\n\nThe left node makes nine pictures; your own pictures or clip (**Load Image**, **Get Video "
        "Components**) can take its place. The right node starts with them and goes on.\n\nA single picture is held for one "
        "chunk; the small model, which never saw one, goes on holding it.",
    ),
    "compare": (
        COMPARE,
        {
            "1": (0, 0, 330, 130),
            "2": (0, 190, 330, 240),
            "3": (390, 0, 330, 330),
            "4": (390, 390, 330, 160),
            "5": (780, 0, 340, 660),
            "6": (1160, 0, 340, 660),
            "7": (0, 720, 480, 330),
            "8": (540, 720, 240, 110),
            "9": (840, 720, 660, 330),
            "note": (0, 490, 330, 150),
        },
        "### What did quantization change?\n\nThe same noise through the float and the 4-bit model: both videos, their difference, "
        "and PSNR and SSIM chunk by chunk.",
    ),
}


def main() -> None:
    cache = Path(tempfile.mkdtemp())
    server = comfy_server.Server(comfy_server.find_tree(cache), cache / "base")
    server.start()
    try:
        nodes = server.get("/object_info")
    finally:
        server.stop()
    workflows.EXAMPLES.mkdir(exist_ok=True)
    for name, (graph, places, note) in EXAMPLES.items():
        workflow = workflows.to_workflow(graph, places, note, nodes)
        # What is written must mean what was meant.
        again = workflows.to_prompt(workflow, nodes)
        for identity, entry in graph.items():
            wrong = {k: v for k, v in entry["inputs"].items() if again[identity]["inputs"].get(k) != v}
            assert not wrong, (name, identity, wrong)
        path = workflows.EXAMPLES / f"{name}.json"
        path.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
