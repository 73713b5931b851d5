"""Save a stream between two chunks, in memory or in one safetensors file, and restore it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file

from ..files.atomic import atomic_file
from ..files.hashing import hash_tensors
from ..files.safetensors import TensorSpec, check_finite, open_tensors, read_header
from ..files.schema import parse_json
from ..quantization.adapters import layer_scales
from ..quantization.model import quantized_linears
from .chunk_loop import ChunkLoop
from .config import RolloutConfig
from .decoder import StatefulDecoder
from .inputs import StreamInputs
from .pass_info import PassInfo
from .session import PromptChange, StepCallback, StreamRequest, StreamSession
from .state_schema import REMEDY, below, check_parts, check_state

if TYPE_CHECKING:
    from .host import StreamHost

_KEY, _VERSION = "qarvd_stream", 2  # metadata entry of the file
_SAMPLES = 16  # values per tensor that the fingerprint looks at


@runtime_checkable
class _SavableCache(Protocol):
    """A K/V cache, the pipeline's own or another, that can be saved."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]: ...


def fingerprint(pipe: StreamHost) -> dict[str, str]:
    """Return short hashes of what a resumed stream depends on: rollout config, transformer, VAE, and its share of the
    heads.

    Only a few values of each tensor are hashed. Those of a quantized layer are sorted first, since the layout for a
    kernel may change their order.
    """
    hashes = {"causal fields": hashlib.blake2b(json.dumps(pipe.rollout_config.to_dict()).encode(), digest_size=8)}
    for name in ("transformer", "vae"):
        model = getattr(pipe, name, None)
        if model is None:
            continue
        digest = hashes[name] = hashlib.blake2b(digest_size=8)
        config = {
            key: str(value) for key, value in model.config.items() if key[0] != "_" and "quantization" not in key
        }
        digest.update(json.dumps(config, sort_keys=True).encode())
        quantized = quantized_linears(model)
        for key, tensor in _stored(model):
            owner, _, leaf = key.rpartition(".")
            values = tensor.detach().flatten()
            if owner in quantized:
                if leaf != "weight_scale":
                    continue
                values = values.sort().values
            hash_tensors(digest, [(key, values[:: max(1, len(values) // _SAMPLES)])])
    digests = {name: digest.hexdigest() for name, digest in hashes.items()}
    parallel = getattr(pipe.transformer, "context_parallel", None)
    return digests if parallel is None else digests | {"process": f"{parallel.rank} of {parallel.size}"}


def _adapters(pipe: StreamHost) -> dict[str, dict[str, float]]:
    """Return the active adapters and their scales: one number under `""`, or one per layer if layers differ."""
    return {
        name: scales if len(set(scales.values())) > 1 else {"": next(iter(scales.values()))}
        for name, scales in layer_scales(pipe.transformer).items()
    }


def _describe_scales(scales: Mapping[str, float] | None) -> str:
    """Return "at scale ..." or "not active", for messages."""
    if scales is None:
        return "not active"
    if "" in scales:
        return f"at scale {scales['']}"
    return f"at scales {sorted(set(scales.values()))} in different layers"


def _stored(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a state dict holds; making one would undo the layout that the running stream's kernels use."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None:
                yield f"{prefix}.{name}".removeprefix("."), tensor


def take_state(pipe: StreamHost, session: StreamSession) -> SavedStream:
    """Return the state of a running stream, see `Stream.state`."""
    request, live = session.request, session.live
    if live is None:
        raise ValueError("only a running stream has a state to save: this one has not begun, or has ended")
    if request.overlap_decoding:
        raise ValueError(
            "a stream with overlap_decoding has computed more than it returned and cannot be saved: stream without"
        )
    loop = live.loop
    if not isinstance(loop.cache, _SavableCache):
        raise ValueError(f"a {type(loop.cache).__name__} cannot be saved: it has no state()")
    decoder_tensors = {} if live.decoder is None else live.decoder.state_dict()
    changes = session.encode_changes(pipe, loop.prompt_embeds)
    loop.refresh()
    cache_tensors, cache_state = loop.cache.state()
    loop_tensors, loop_state = loop.state()
    input_tensors, input_state = _pack_inputs(request.inputs, loop)
    tensors = {
        **{f"cache.{name}": tensor for name, tensor in cache_tensors.items()},
        **{f"loop.{name}": tensor for name, tensor in loop_tensors.items()},
        **{f"decoder.{name}": tensor for name, tensor in decoder_tensors.items()},
        **{f"inputs.{name}": tensor for name, tensor in input_tensors.items()},
        **{f"next_prompt.{index}": change.text["prompt_embeds"] for index, change in enumerate(changes)},
        "prompt_embeds": loop.prompt_embeds,
    }
    header = {
        "version": _VERSION,
        "model": fingerprint(pipe),
        "adapters": _adapters(pipe),
        "fields": request.inputs.fields.to_dict(),
        "output_type": request.output_type,
        "kv_cache": request.kv_cache,
        "next_prompts": [change.how for change in changes],
        "controls": session.steered,
        "cache": cache_state,
        "loop": loop_state,
        "inputs": input_state,
    }
    owned = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return SavedStream("the state", json.loads(json.dumps(header)), owned)


def _pack_inputs(inputs: StreamInputs, loop: ChunkLoop) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the inputs of a stream, with the states of its generators, as tensors and JSON types."""
    tensors = {name: getattr(inputs, name) for name in ("latents", "initial_latents", "condition")}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if inputs.renoise_latents is not None:
        tensors |= {f"renoise.{index}": noise for index, noise in enumerate(inputs.renoise_latents)}
    source = inputs.generator
    if source is None:  # the resumed stream draws from a generator of its own, in the state of the global one
        device = loop.device
        states = [torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()]
    else:
        generators = source if isinstance(source, list) else [source]
        device, states = generators[0].device, [generator.get_state() for generator in generators]
    tensors |= {f"generator.{index}": state for index, state in enumerate(states)}
    state = {
        "shape": list(inputs.shape),
        "num_chunks": inputs.num_chunks,
        "generator_device": str(device),
        "one_generator": not isinstance(source, list),
    }
    return tensors, state


@dataclass
class SavedStream:
    """The state of a stream between two chunks. Restoring a stream leaves it as it is.

    Attributes:
        path: of the file that it was read from; shown in messages.
        header: JSON metadata of the file.
        tensors: all its tensors, on the CPU.
    """

    path: str
    header: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SavedStream:
        """Read a file that `save_state` wrote.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is another kind of file, or damaged; names file and entry.
        """
        path = os.fspath(path)
        specs, texts = read_header(path)
        header: dict[str, Any] = parse_json(texts.get(_KEY, "{}"), f"{path}: {_KEY}")  # empty: another kind of file
        if header.get("version") != _VERSION:
            raise ValueError(f"{path} is no stream saved by Stream.save_state of this version")
        check_state(path, header, specs)
        with open_tensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in specs}
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                check_finite(tensor, f"{path}: {name}", positive=name.endswith(("key_scale", "value_scale")))
        return cls(path, header, tensors)

    @property
    def num_chunks(self) -> int:
        """Chunks that were generated before the state was saved."""
        return self.header["loop"]["_next_chunk"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file for `load`."""
        with atomic_file(path) as temporary:
            save_file(self.tensors, temporary, metadata={_KEY: json.dumps(self.header)})

    def check(self, pipe: StreamHost) -> None:
        """Check that the pipeline has the model that the stream was saved with.

        Raises:
            ValueError: if it has another one; names the parts that differ.
        """
        own, saved = fingerprint(pipe), self.header["model"]
        self._check_adapters(pipe)
        if pipe.rollout_config != RolloutConfig.from_config(self.header["fields"]):
            own = own | {"causal fields": ""}
        differing = [name for name in sorted(own.keys() | saved.keys()) if own.get(name) != saved.get(name)]
        if differing:
            raise ValueError(
                f"{self.path} was saved with another model: {' and '.join(differing)} differ from this pipeline's. "
                "Load the model, scheme and dtype that the stream was made with"
            )

    def _check_adapters(self, pipe: StreamHost) -> None:
        saved, own = self.header.get("adapters"), _adapters(pipe)
        if saved is None:  # an older file
            return
        for name in sorted(saved.keys() | own.keys()):
            if saved.get(name) != own.get(name):
                raise ValueError(
                    f"{self.path} was saved with adapter {name!r} {_describe_scales(saved.get(name))}, this pipeline "
                    "has it "
                    f"{_describe_scales(own.get(name))}: load it and set its scale with set_adapters(), or disable "
                    "or unload it"
                )

    def session(
        self,
        output_type: str | None,
        on_pass: Callable[[PassInfo], None] | None,
        decoder: StatefulDecoder | None,
        num_chunks: int | None,
        generator: torch.Generator | None,
        callback: StepCallback,
    ) -> StreamSession:
        """Return the session of the resumed stream; the arguments are those of `StreamableMixin.restore_stream`.

        Raises:
            ValueError: if frames are asked for, but the stream was one of latents; or for `num_chunks` or a
                `generator` that the stream cannot continue with.
        """
        output_type = output_type or self.header["output_type"]
        if output_type != "latent" and self.header["output_type"] == "latent":
            raise ValueError(f"{self.path} holds a stream of latents, without the VAE's memory: ask for 'latent'")
        request = StreamRequest(
            self._continued_inputs(num_chunks, generator),
            {"prompt_embeds": self.tensors["prompt_embeds"]},
            output_type,
            self.header["kv_cache"],
            callback=callback,
            on_pass=on_pass,
            decoder=decoder,
            saved=replace(self, header=copy.deepcopy(self.header), tensors=dict(self.tensors)),
        )
        changes = [
            PromptChange({"prompt_embeds": self.tensors[f"next_prompt.{index}"]}, how)
            for index, how in enumerate(self.header["next_prompts"])
        ]
        return StreamSession(request, changes, steered=self.header.get("controls", False))

    def _continued_inputs(self, num_chunks: int | None, generator: torch.Generator | None) -> StreamInputs:
        inputs = self._inputs
        if num_chunks is not None:
            done, limit = self.num_chunks, None if inputs.latents is None else inputs.num_chunks
            if num_chunks < done or (limit is not None and num_chunks > limit):
                raise ValueError(
                    f"num_chunks is {num_chunks}, expected at least the {done} chunks that {self.path} has made"
                    + ("" if limit is None else f" and at most the {limit} that it has noise for")
                )
            inputs = replace(inputs, num_chunks=num_chunks)
        if generator is not None:
            saved = inputs.generator
            if not isinstance(saved, torch.Generator):
                raise ValueError(f"the noise of {self.path} was drawn by one generator per sample: pass no generator")
            if saved.device.type != generator.device.type:
                raise ValueError(
                    f"generator is on {generator.device.type}, expected one on {saved.device.type}, where "
                    f"{self.path} drew its noise"
                )
            generator.set_state(saved.get_state())
            inputs = replace(inputs, generator=generator)
        return inputs

    @property
    def _inputs(self) -> StreamInputs:
        """The inputs that `_pack_inputs` packed."""
        state, tensors = self.header["inputs"], below("inputs.", self.tensors)
        states, renoise = (
            [tensors[f"{kind}.{index}"] for index in range(sum(name.startswith(f"{kind}.") for name in tensors))]
            for kind in ("generator", "renoise")
        )
        generators = [_generator(state["generator_device"], bits, self.path) for bits in states]
        return StreamInputs(
            RolloutConfig.from_config(self.header["fields"]),
            tuple(state["shape"]),
            state["num_chunks"],
            tensors.get("latents"),
            renoise or None,
            tensors.get("initial_latents"),
            generators[0] if state["one_generator"] else generators,
            tensors.get("condition"),
        )

    def restore(self, loop: ChunkLoop, decoder: StatefulDecoder | None) -> None:
        """Restore the state into a new loop and decoder, and drop the tensors of this copy.

        Raises:
            ValueError: if the cache or the decoder expects other tensors; names file and entry.
        """
        specs = {name: TensorSpec.of(tensor) for name, tensor in self.tensors.items()}
        check_parts(self.path, self.header, specs, loop.cache, decoder)
        loop.load_state(below("loop.", self.tensors), self.header["loop"])
        loop.cache.load_state(below("cache.", self.tensors), self.header["cache"], loop.device)
        if decoder is not None:
            decoder.load_state_dict(below("decoder.", self.tensors))
        self.tensors.clear()  # they are on the device now


def _generator(device: str, bits: torch.Tensor, path: str) -> torch.Generator:
    """Return a generator in a saved state; raise ValueError if there is no such device, or the state is damaged."""
    try:
        generator = torch.Generator(device)
        generator.set_state(bits)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: inputs.generator of device {device!r} ({error}): {REMEDY}") from error
    return generator
