"""What users choose, name and connect: every choice gives the right model, anything else a plain error."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from graphs import BUNDLED, PROMPT, node, quantize_graph, read_video, second_stream, stream_graph
from PIL import Image
from safetensors.torch import load_file, save_file

from qarvd_diffusers import ARVDPipeline, bundled_model_path, to_original_keys

pytestmark = pytest.mark.slow

HEAD = 11.82  # norm of the last layer's weight in the bundled model


def expect_two_lines(message: str, problem: str, remedy: str) -> None:
    lines = message.strip().splitlines()
    assert len(lines) == 2, message
    assert problem in lines[0] and remedy in lines[1], message


@pytest.fixture(scope="module")
def pipe():
    return ARVDPipeline.from_pretrained(bundled_model_path())


@pytest.fixture(scope="module")
def original(pipe):
    """Tensors of the bundled model under original names, the head's weight multiplied."""

    def scaled(factor: float) -> dict[str, torch.Tensor]:
        tensors = to_original_keys(pipe.transformer.state_dict())
        tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        head = next(name for name in tensors if name.endswith("head.head.weight"))
        tensors[head] *= factor
        return tensors

    return scaled


def choices(server, kind: str, name: str) -> list[str]:
    """What a list of a node offers."""
    spec = server.get(f"/object_info/{kind}")[kind]["input"]
    found = {**spec.get("required", {}), **spec.get("optional", {})}[name]
    return found[0] if isinstance(found[0], list) else found[1]["options"]


def refusal(server, graph: dict) -> list[dict]:
    """Errors for which a prompt is not even queued."""
    status, body = server.post("/prompt", {"prompt": graph})
    assert status == 400, body
    return [error for entry in body["node_errors"].values() for error in entry["errors"]]


class TestOriginalCheckpoints:
    def loaded(self, server, model: str, **options) -> tuple[float, bool]:
        """Norm of the head of what Load Pipeline makes of a file, and whether there is a VAE."""
        graph = quantize_graph(name="loaded")
        graph["11"] = node("QARVDLoadPipeline", model=model, **options)
        run = server.run(graph)
        assert run.status == "success", run.error
        folder = server.base / "output" / "qarvd" / "loaded"
        tensors = load_file(next((folder / "transformer").glob("*.safetensors")))
        has_vae = (folder / "vae").is_dir()
        shutil.rmtree(folder)
        return float(tensors["proj_out.weight"].norm()), has_vae

    def converted(self, server) -> int:
        return len(list((server.base / "output" / "qarvd" / ".converted").glob("*/*/model_index.json")))

    def test_every_file_base_and_rollout_gives_its_own_model(self, server, pipe, original):
        models = server.base / "models"
        for root, name, factor in (("qarvd", "one", 1), ("qarvd", "two", 2), ("diffusers", "one", 4)):
            (models / root / name).mkdir(parents=True)
            torch.save(original(factor), models / root / name / "model.pt")
        pipe.save_pretrained(models / "qarvd" / "lender")
        sf = {"rollout": "self-forcing"}
        assert self.loaded(server, "one/model.pt", **sf) == (pytest.approx(HEAD, abs=0.01), False)
        assert self.loaded(server, "two/model.pt", **sf)[0] == pytest.approx(2 * HEAD, abs=0.01)
        assert self.loaded(server, "one/model.pt [models/diffusers]", **sf)[0] == pytest.approx(4 * HEAD, abs=0.05)
        assert self.loaded(server, "one/model.pt", base="lender", **sf) == (pytest.approx(HEAD, abs=0.01), True)
        assert self.converted(server) == 4
        # Replaced: the old one, with its base and without, is not kept.
        torch.save(original(3), models / "qarvd" / "one" / "model.pt")
        assert self.loaded(server, "one/model.pt", **sf)[0] == pytest.approx(3 * HEAD, abs=0.05)
        assert self.converted(server) == 3
        # The dtype is that of loading: nothing is converted again.
        assert self.loaded(server, "one/model.pt", dtype="bfloat16", **sf)[0] == pytest.approx(3 * HEAD, abs=0.2)
        assert self.converted(server) == 3

    def test_other_suffixes_depths_and_rollouts(self, server, original):
        deep = server.base / "models" / "qarvd" / "family" / "release" / "v1"
        deep.mkdir(parents=True)
        torch.save(original(5), deep / "causal_forcing.pth")
        save_file(original(6), deep / "model_bf16.safetensors")
        listed = choices(server, "QARVDLoadPipeline", "model")
        assert {"family/release/v1/causal_forcing.pth", "family/release/v1/model_bf16.safetensors"} <= set(listed)
        assert self.loaded(server, "family/release/v1/causal_forcing.pth")[0] == pytest.approx(5 * HEAD, abs=0.05)
        file = "family/release/v1/model_bf16.safetensors"
        source = node("QARVDLoadPipeline", model=file, rollout="causal-forcing")
        for rollout, expected in (("causal-forcing", "chunks of 3"), ("causvid", "attention over all latent frames")):
            source["inputs"]["rollout"] = rollout
            run = server.run({"1": source, "2": node("QARVDInfo", pipeline=["1", 0])})
            assert run.status == "success", run.error
            assert expected in run.text("2")

    def test_what_was_converted_is_in_no_list(self, server):
        assert self.converted(server)
        for kind, name in (("QARVDLoadPipeline", "model"), ("QARVDLoadPipeline", "base")):
            assert not [entry for entry in choices(server, kind, name) if "converted" in entry]
        assert "model" not in choices(server, "QARVDLoadPipeline", "base")


class TestNames:
    def test_a_model_in_nested_folders_is_listed_and_loads(self, server):
        assert server.run(quantize_graph(name="a/b\\c/d")).status == "success"
        assert "a/b/c/d" in choices(server, "QARVDLoadQuantized", "checkpoint")
        assert "a/b/c/d" in choices(server, "QARVDLoadPipeline", "model")
        graph = {"1": node("QARVDLoadQuantized", checkpoint="a/b/c/d"), "2": node("QARVDInfo", pipeline=["1", 0])}
        assert "w8a16" in server.run(graph).text("2")

    def test_a_circle_of_links_ends(self, server):
        (server.base / "models" / "qarvd" / "round").mkdir(parents=True)
        (server.base / "models" / "qarvd" / "round" / "about").symlink_to(server.base / "models" / "qarvd")
        assert not [name for name in choices(server, "QARVDLoadPipeline", "model") if name.startswith("round")]

    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("con:name?*", "has '*', ':', '?', which Windows does not allow in names"),
            ("x\0y", "has '\\x00'"),
            ("models/NUL.v1", "'NUL.v1' is reserved on Windows"),
            ("com1", "is reserved on Windows"),
            ("w4a8.", "ends in a dot"),
            (".w4a8", "would not be listed"),
            ("n" * 300, "is longer than 200 bytes"),
            ("../../x", "is not inside"),
            ("/x", "is not inside"),
            (" ", "is not inside"),
        ],
    )
    def test_a_name_that_is_none_everywhere_is_refused_before_work(self, server, name, problem):
        (error,) = refusal(server, quantize_graph(name=name))
        assert problem in error["details"] and "Give " in error["details"] and "\n" not in error["details"]

    def test_a_name_that_is_in_the_way_is_refused(self, server):
        assert server.run(quantize_graph(name="outer")).status == "success"
        expect_two_lines(server.run(quantize_graph(name="outer/sub")).error, "is inside the model outer", "beside it")
        assert server.run(quantize_graph(name="group/member")).status == "success"
        run = server.run(quantize_graph(name="group"))
        expect_two_lines(run.error, "'group' is taken by a folder that is not a saved model", "Give another name")
        (server.base / "output" / "qarvd" / "notes").write_text("mine")
        expect_two_lines(server.run(quantize_graph(name="notes")).error, "taken by a file", "Give another name")
        expect_two_lines(server.run(quantize_graph(name="notes/x")).error, "inside the file notes", "beside it")


class TestChoices:
    def test_a_missing_checkpoint_is_named_by_comfyui(self, server):
        graph = {"1": node("QARVDLoadQuantized"), "2": node("QARVDInfo", pipeline=["1", 0])}
        assert [error["type"] for error in refusal(server, graph)] == ["required_input_missing"]

    def test_a_checkpoint_that_is_not_there_is_one_line(self, server):
        graph = {"1": node("QARVDLoadQuantized", checkpoint="gone"), "2": node("QARVDInfo", pipeline=["1", 0])}
        (error,) = refusal(server, graph)
        assert "There is no model 'gone'" in error["details"] and "Q-ARVD Save Quantized" in error["details"]
        assert "\n" not in error["details"]


def with_prompt(kind: str, **inputs) -> dict:
    """A stream whose prompt "2" passes through another node."""
    graph = stream_graph(chunks=1, preview="off")
    graph["7"] = node(kind, **inputs)
    graph["3"]["inputs"]["positive"] = ["7", 0]
    return graph


class TestConditioning:
    def test_two_prompts_are_refused(self, server):
        run = server.run(with_prompt("ConditioningCombine", conditioning_1=["2", 0], conditioning_2=["2", 0]))
        expect_two_lines(run.error, "positive holds 2 prompts", "Connect one prompt")

    def test_what_is_not_used_is_said(self, server):
        area = {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0}
        run = server.run(with_prompt("ConditioningSetArea", conditioning=["2", 0], **area))
        assert run.status == "success", run.error
        assert "does not use these entries of positive: area" in server.log.read_text()


LATENTS = {
    "pictures": (node("EmptyLatentImage", width=64, height=64, batch_size=1), "holds no video: it is [1, 4, 8, 8]"),
    "channels": (node("EmptyMochiLatentVideo", width=64, height=64, length=25, batch_size=1), "has 12 channels"),
    "two": (node("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=2), "holds 2 videos"),
}


class TestLatents:
    @pytest.mark.parametrize("latent", LATENTS)
    def test_only_one_video_of_the_model_is_taken(self, server, latent):
        source, problem = LATENTS[latent]
        graph = stream_graph(chunks=1, preview="off", start_latent=["7", 0])
        run = server.run({**graph, "7": source})
        remedy = "Latent From Batch" if latent == "two" else "VAE Encode"
        expect_two_lines(run.error, f"start_latent {problem}", remedy)
        graph = {"1": node("QARVDLoadPipeline", model=BUNDLED), "7": source}
        graph["8"] = node("QARVDDecode", pipeline=["1", 0], latent=["7", 0])
        graph["9"] = node("PreviewImage", images=["8", 0])
        expect_two_lines(server.run(graph).error, f"latent {problem}", remedy)

    def test_a_mask_is_not_used_and_said(self, server):
        graph = stream_graph(chunks=1, preview="off", start_latent=["9", 0])
        graph["7"] = node("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1)
        graph["8"] = node("SolidMask", value=1.0, width=64, height=64)
        graph["9"] = node("SetLatentNoiseMask", samples=["7", 0], mask=["8", 0])
        run = server.run(graph)
        assert run.status == "success", run.error
        assert "does not use these entries of start_latent: noise_mask" in server.log.read_text()

    def test_a_state_of_another_model_goes_on_with_a_note(self, server):
        graph = stream_graph(chunks=1, preview="off")
        graph["12"] = node("QARVDQuantize", pipeline=["1", 0], scheme="w8a16")
        run = server.run(graph | second_stream(pipeline=["12", 0], state=["3", 3]))
        assert run.status == "success", run.error
        assert "the state was made with tiny-arvd, tiny-arvd w8a16 continues from it" in server.log.read_text()
        assert "encodes the frames of the state again: " in server.log.read_text()

    def test_a_circle_in_a_wide_picture_stays_a_circle(self, server):
        rows, columns = np.mgrid[:128, :512]
        circle = (rows - 63.5) ** 2 + (columns - 255.5) ** 2 < 40**2
        Image.fromarray((circle[..., None] * 255).astype(np.uint8).repeat(3, -1)).save(
            server.base / "input" / "wide.png"
        )
        graph = stream_graph(chunks=1, preview="off", prompt=PROMPT, start_image=["7", 0])
        run = server.run({**graph, "7": node("LoadImage", image="wide.png")})
        assert run.status == "success", run.error
        seen = read_video(server.files(run, "4")[0])[0].mean(-1) > 127
        extents = [int(seen.any(axis).sum()) for axis in (0, 1)]
        assert abs(extents[0] - extents[1]) <= 3 and abs(extents[0] - 40) <= 6, extents


def test_colours_are_among_the_losses_of_an_int8_file(server):
    """The bundled model's VAE has statistics of its own, which ComfyUI does not read from the file."""
    graph = quantize_graph(name="colours")
    graph["13"]["inputs"]["format"] = "ComfyUI int8 file"
    run = server.run(graph)
    assert run.status == "success", run.error
    assert "The mean and deviation of this VAE's latents are lost" in run.text("13")
