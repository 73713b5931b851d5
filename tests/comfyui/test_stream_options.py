"""LoRAs, prompt schedules, memory, offloading and Stop in Stream Generate, against the library's own streams."""

from __future__ import annotations

import time

import pytest
import torch
from comfy_server import Run, Server
from graphs import PROMPT, node, quantize_graph, read_video, save_video, stream_graph
from safetensors.torch import load_file, save_file

from qarvd_diffusers import ARVDPipeline, bundled_model_path

pytestmark = pytest.mark.slow

SQUARE = "a small blue square moving right on a white background"
LAYERS = ("blocks.2.ffn.0", "blocks.1.self_attn.q")


@pytest.fixture(scope="module")
def pipe():
    return ARVDPipeline.from_pretrained(bundled_model_path())


@pytest.fixture(scope="module")
def loras(server, pipe):
    """Two LoRA files in models/loras, one of them nested."""
    folder = server.base / "models" / "loras"
    (folder / "wan" / "tiny").mkdir(parents=True)
    sizes = {"blocks.2.ffn.0": (576, 256), "blocks.1.self_attn.q": (256, 256)}
    paths = []
    for seed, (layer, name) in enumerate(zip(LAYERS, ("one.safetensors", "wan/tiny/two.safetensors"), strict=True)):
        generator, (rows, columns) = torch.Generator().manual_seed(seed), sizes[layer]
        tensors = {
            f"diffusion_model.{layer}.lora_A.weight": 0.3 * torch.randn(4, columns, generator=generator),
            f"diffusion_model.{layer}.lora_B.weight": 0.3 * torch.randn(rows, 4, generator=generator),
        }
        save_file(tensors, folder / name)
        paths.append(folder / name)
    return paths


def expect_two_lines(message: str, problem: str, remedy: str) -> None:
    lines = message.strip().splitlines()
    assert len(lines) == 2, message
    assert problem in lines[0] and remedy in lines[1], message


def latents_of(server: Server, graph: dict, pipe) -> torch.Tensor:
    """Normalized latents that "3" of a graph makes."""
    run = server.run({**graph, "30": node("SaveLatent", samples=["3", 1], filename_prefix="latents/options")})
    assert run.status == "success", run.error
    entry = run.history["outputs"]["30"]["latents"][0]
    raw = load_file(server.base / entry["type"] / entry["subfolder"] / entry["filename"])["latent_tensor"]
    mean, std = (torch.tensor(pipe.vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (raw - mean) / std


def library_latents(pipe, chunks: int, changes: dict | None = None) -> torch.Tensor:
    """What the library makes of seed 0; `changes` are arguments of `set_prompt` by the chunk that they hold from."""
    pieces = []
    generator = torch.Generator().manual_seed(0)
    with pipe.stream(PROMPT, num_chunks=chunks, generator=generator, output_type="latent") as stream:
        for chunk in stream:
            pieces.append(chunk.latents.float())
            if changes and chunk.index + 2 in changes:
                stream.set_prompt(**changes[chunk.index + 2])
    return torch.cat(pieces, dim=2)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_stack_of_loras_is_that_of_the_library_and_leaves_no_trace(server, pipe, loras):
    graph = stream_graph(chunks=2, preview="off")
    plain = latents_of(server, graph, pipe)
    graph["7"] = node("QARVDLora", lora="one.safetensors", strength=0.7)
    graph["8"] = node("QARVDLora", lora="wan/tiny/two.safetensors", strength=-0.4, loras=["7", 0])
    graph["3"]["inputs"]["loras"] = ["8", 0]
    stacked = latents_of(server, graph, pipe)
    try:
        for path, name in zip(loras, "ab", strict=True):
            pipe.load_lora_weights(path, adapter_name=name)
        pipe.set_adapters(["a", "b"], [0.7, -0.4])
        expected = library_latents(pipe, 2)
    finally:
        pipe.unload_lora_weights()
    assert error(stacked, expected) < 1e-3 < 0.02 < error(stacked, plain)
    assert error(plain, library_latents(pipe, 2)) < 1e-3
    server.post("/free", {"free_memory": True})
    assert torch.equal(latents_of(server, stream_graph(chunks=2, preview="off"), pipe), plain)


@pytest.mark.parametrize("scheme", ["float", "w8a16"])
def test_blocks_one_by_one_give_the_same_bits_also_with_a_lora(server, pipe, loras, scheme):
    base = stream_graph(chunks=2, preview="off")
    base["7"] = node("QARVDLora", lora="one.safetensors", strength=0.7)
    base["3"]["inputs"]["loras"] = ["7", 0]
    if scheme != "float":
        base |= {name: entry for name, entry in quantize_graph(scheme).items() if name != "13"}
        base["3"]["inputs"]["pipeline"] = ["12", 0]
    found = []
    for offload in ("off", "blocks", "off"):
        graph = {**base, "3": node("QARVDStreamGenerate", **base["3"]["inputs"], offload=offload)}
        found.append(latents_of(server, graph, pipe))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("text", "options", "switch"),
    [
        (
            f"1: {PROMPT}\n# a note\n\n3: {SQUARE}",
            {"on_prompt_switch": "new_text_only"},
            {"on_prompt_switch": "new_text_only"},
        ),
        (f"{PROMPT}\n{SQUARE}", {"chunks_per_prompt": 2}, {}),
        (
            f"{PROMPT}\n2: {SQUARE}",
            {"on_prompt_switch": "recache", "over_chunks": 2},
            {"on_prompt_switch": "recache", "over_chunks": 2},
        ),
    ],
    ids=["numbers", "list", "gradual"],
)
def test_a_schedule_is_the_library_s_change_of_prompts(server, pipe, text, options, switch):
    graph = stream_graph(chunks=3, preview="off")
    graph["2"] = node("QARVDPromptSchedule", pipeline=["1", 0], text=text, **{"chunks_per_prompt": 1, **options})
    got = latents_of(server, graph, pipe)
    begin = 2 if text.startswith(f"{PROMPT}\n2") else 3
    expected = library_latents(pipe, 3, {begin: {"prompt": SQUARE, **switch}})
    assert error(got, expected) < 1e-3 < 0.02 < error(got, library_latents(pipe, 3))


@pytest.mark.parametrize(
    ("text", "options", "problem", "remedy"),
    [
        ("# nothing", {}, "The schedule has no prompt", "Write one prompt per line"),
        ("2: late", {}, "The first prompt begins at chunk 2", "begin at chunk 1"),
        ("1: a\n3: b\n2: c", {}, "The prompt of chunk 2 comes after that of chunk 3", "in the order"),
        ("1:", {}, "The line '1:' has no prompt", "after the number"),
        ("1: a\n5: b", {}, "A prompt begins at chunk 5, but num_chunks is 2", "Set num_chunks to 5"),
        ("1: a\n2: b", {"over_chunks": 2, "on_prompt_switch": "cut"}, "over_chunks is 2", "Change on_prompt_switch"),
    ],
)
def test_a_schedule_that_cannot_be_followed(server, text, options, problem, remedy):
    graph = stream_graph(chunks=2, preview="off")
    graph["2"] = node("QARVDPromptSchedule", pipeline=["1", 0], text=text, chunks_per_prompt=1, **options)
    expect_two_lines(server.run(graph).error, problem, remedy)


def test_loras_that_cannot_be_used(server, loras):
    folder = server.base / "models" / "loras"
    save_file(
        {"other.lora_A.weight": torch.zeros(4, 8), "other.lora_B.weight": torch.zeros(8, 4)}, folder / "x.safetensors"
    )
    graph = stream_graph(chunks=1, preview="off")
    graph["7"] = node("QARVDLora", lora="x.safetensors", strength=1.0)
    graph["3"]["inputs"]["loras"] = ["7", 0]
    expect_two_lines(server.run(graph).error, "The LoRA x.safetensors cannot be used: ", "made for this model")
    graph["7"] = node("QARVDLora", lora="one.safetensors", strength=1.0)
    graph["8"] = node("QARVDLora", lora="one.safetensors", strength=1.0, loras=["7", 0])
    graph["3"]["inputs"]["loras"] = ["8", 0]
    expect_two_lines(server.run(graph).error, "The LoRA one.safetensors is in the stack twice", "sum of the strengths")
    del graph["7"], graph["8"], graph["3"]["inputs"]["loras"]
    assert server.run(graph).status == "success", "and the model is as before"


def wait_for_chunks(run: Run, count: int) -> None:
    end = time.monotonic() + 240
    while len([status for status in run.of("qarvd.stream") if status["made"] >= count]) == 0:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_stop_keeps_what_is_done_if_asked(server):
    graph = stream_graph(chunks=300, seed=50, preview="off", on_stop="keep")
    graph["5"] = node(
        "QARVDStreamGenerate", pipeline=["1", 0], positive=["2", 0], num_chunks=1, seed=0, state=["3", 3]
    )
    graph["6"] = save_video(["5", 2], "more")
    run = server.submit(graph)
    wait_for_chunks(run, 2)
    server.post("/interrupt", {})
    server.wait(run)
    assert run.status == "success", run.error
    status = run.history["outputs"]["3"]["qarvd_stream"][0]
    assert (status["state"], 2 <= status["made"] < 20) == ("early", True)
    assert len(read_video(server.files(run, "4")[0])) == 9 + 12 * (status["made"] - 1)
    assert len(read_video(server.files(run, "6")[0])) == 12, "and the video goes on from there"


def test_memory_chooses_cache_and_window_or_says_what_does_not_fit(server):
    graph = stream_graph(chunks=1, preview="off", memory="6GB")
    assert server.run(graph).status == "success"
    assert "for 6GB, kv_cache is auto and local_attention_frames" in server.log.read_text()
    graph["3"]["inputs"] |= {"width": 8192, "height": 8192}
    expect_two_lines(server.run(graph).error, "does not fit into 6GB", "Allow more memory")


@pytest.mark.parametrize("name", ["memory", "offload", "on_stop"])
def test_values_that_are_no_choice(server, name):
    graph = stream_graph(chunks=1, preview="off", **{name: "nonsense"})
    if server.version >= (0, 4):
        status, _ = server.post("/prompt", {"prompt": graph})
        assert status == 400
    else:
        assert len(server.run(graph).error.strip().splitlines()) == 2
