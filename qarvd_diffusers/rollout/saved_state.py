"""Save a stream between two chunks, in memory or in one safetensors file, and restore it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files.atomic import atomic_file
from ..files.hashing import hash_tensors
from ..quantization.adapters import layer_scales
from ..quantization.model import quantized_linears
from .chunk_loop import ChunkLoop
from .config import CausalFields
from .decode_queue import Decoder
from .inputs import StreamInputs
from .pass_info import PassInfo
from .session import PromptChange, StreamSession

if TYPE_CHECKING:
    from .host import StreamHost

_KEY, _VERSION = "qarvd_stream", 2  # metadata entry of the file
_SAMPLES = 16  # values per tensor that tell one model from another


def fingerprint(pipe: StreamHost) -> dict[str, str]:
    """Short hashes of what a stream's continuation depends on: causal fields, transformer, VAE, and its part of the heads.

    Of each tensor a few values are looked at. Those of a quantized layer are compared without regard to their order, which
    the layout for a kernel may change.
    """
    hashes = {"causal fields": hashlib.blake2b(json.dumps(pipe.causal_fields.to_dict()).encode(), digest_size=8)}
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
    found = {name: digest.hexdigest() for name, digest in hashes.items()}
    parallel = getattr(pipe.transformer, "context_parallel", None)
    return found if parallel is None else found | {"process": f"{parallel.rank} of {parallel.size}"}


def _adapters(pipe: StreamHost) -> dict[str, dict[str, float]]:
    """Active adapters and their scales: one number under `""`, or where layers differ one for each layer."""
    found = layer_scales(pipe.transformer)
    return {
        name: scales if len(set(scales.values())) > 1 else {"": next(iter(scales.values()))}
        for name, scales in found.items()
    }


def _spoken(scales: Mapping[str, float] | None) -> str:
    if scales is None:
        return "not active"
    return (
        f"at scale {scales['']}" if "" in scales else f"at scales {sorted(set(scales.values()))} in different layers"
    )


def _stored(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a state dict holds, without asking for one: that would undo the layout for kernels of the running stream."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None:
                yield f"{prefix}.{name}".removeprefix("."), tensor


def take_state(pipe: StreamHost, session: StreamSession) -> SavedStream:
    """See `Stream.state`."""
    loop = session.loop
    if loop is None:
        raise ValueError("only a running stream has a state to save: this one has not begun, or has ended")
    if session.overlap_decoding:
        raise ValueError("a stream with overlapped decoding is ahead of what it handed out: save one without")
    for part, method in ((loop.cache, "state"), (session.decoder, "state_dict")):
        if part is not None and not hasattr(part, method):
            raise ValueError(f"a {type(part).__name__} cannot be saved: it has no {method}()")
    changes = session.encode_changes(pipe)  # what waits is part of the state
    loop.refresh()
    cache, cache_facts = loop.cache.state()
    where, loop_facts = loop.state()
    decoder = {} if session.decoder is None else session.decoder.state_dict()
    noise, noise_facts = _pack_inputs(session.inputs, loop)
    tensors = {
        **{f"cache.{name}": tensor for name, tensor in cache.items()},
        **{f"loop.{name}": tensor for name, tensor in where.items()},
        **{f"decoder.{name}": tensor for name, tensor in decoder.items()},
        **{f"inputs.{name}": tensor for name, tensor in noise.items()},
        "prompt_embeds": loop.prompt_embeds,
    }
    for index, change in enumerate(changes):
        tensors[f"next_prompt.{index}"] = change.text["prompt_embeds"]
    facts = {
        "version": _VERSION,
        "model": fingerprint(pipe),
        "adapters": _adapters(pipe),
        "fields": session.inputs.fields.to_dict(),
        "output_type": session.output_type,
        "kv_cache": session.kv_cache,
        "next_prompts": [change.how for change in changes],
        "cache": cache_facts,
        "loop": loop_facts,
        "inputs": noise_facts,
    }
    owned = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return SavedStream("the state", json.loads(json.dumps(facts)), owned)


def _pack_inputs(inputs: StreamInputs, loop: ChunkLoop) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {name: getattr(inputs, name) for name in ("latents", "initial_latents")}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if inputs.renoise_latents is not None:
        tensors |= {f"renoise.{index}": noise for index, noise in enumerate(inputs.renoise_latents)}
    given = inputs.generator
    if given is None:  # the continued stream draws from a generator of its own, in the state of the global one
        device = loop.device
        states = [torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()]
    else:
        generators = given if isinstance(given, list) else [given]
        device, states = generators[0].device, [generator.get_state() for generator in generators]
    tensors |= {f"generator.{index}": state for index, state in enumerate(states)}
    facts = {
        "shape": list(inputs.shape),
        "num_chunks": inputs.num_chunks,
        "generator_device": str(device),
        "one_generator": not isinstance(given, list),
    }
    return tensors, facts


@dataclass
class SavedStream:
    """The state of a stream between two chunks. Restoring a stream leaves it as it is.

    Attributes:
        path: of the file that it was read from; in messages.
        facts: what it says beside its tensors, as JSON types.
        tensors: all its tensors, on the CPU.
    """

    path: str
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SavedStream:
        """Read a file that `save_state` wrote.

        Raises:
            ValueError: if it is another kind of file, or damaged.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(_KEY, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()} if facts else {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file ({error}): save the stream again") from error
        if not facts or facts.get("version") != _VERSION:
            raise ValueError(f"{path} is no stream saved by Stream.save_state of this version")
        return cls(os.fspath(path), facts, tensors)

    @property
    def num_chunks(self) -> int:
        """Chunks that were generated before the state was saved."""
        return self.facts["loop"]["_next_chunk"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file for `load`."""
        with atomic_file(path) as temporary:
            save_file(self.tensors, temporary, metadata={_KEY: json.dumps(self.facts)})

    def check(self, pipe: StreamHost) -> None:
        """Refuse to go on with another model than the one the stream was saved with."""
        mine, theirs = fingerprint(pipe), self.facts["model"]
        self._check_adapters(pipe)
        differing = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
        if differing:
            raise ValueError(
                f"{self.path} was saved with another model: {' and '.join(differing)} differ from this pipeline's. Load the "
                "model, scheme and dtype that the stream was made with"
            )

    def _check_adapters(self, pipe: StreamHost) -> None:
        saved, mine = self.facts.get("adapters"), _adapters(pipe)  # older files do not say
        for name in sorted(saved.keys() | mine.keys()) if saved is not None else ():
            if saved.get(name) != mine.get(name):
                raise ValueError(
                    f"{self.path} was saved with adapter {name!r} {_spoken(saved.get(name))}, this pipeline has it "
                    f"{_spoken(mine.get(name))}: load it and set its scale with set_adapters(), or disable or unload it"
                )

    def session(
        self,
        output_type: str | None,
        on_pass: Callable[[PassInfo], None] | None,
        make_decoder: Callable[[], Decoder] | None,
        num_chunks: int | None = None,
        generator: torch.Generator | None = None,
        callback: tuple[Callable | None, tuple[str, ...]] = (None, ()),
    ) -> StreamSession:
        """Build what the continued stream starts from; the arguments are those of `StreamableMixin.restore_stream`.

        Raises:
            ValueError: if frames are asked for, but the stream was one of latents; or for `num_chunks` or a `generator`
                that the stream cannot continue with.
        """
        output_type = output_type or self.facts["output_type"]
        if output_type != "latent" and self.facts["output_type"] == "latent":
            raise ValueError(f"{self.path} holds a stream of latents, without the VAE's memory: ask for 'latent'")
        text = {"prompt_embeds": self.tensors["prompt_embeds"]}
        session = StreamSession(
            self._continued_inputs(num_chunks, generator),
            text,
            output_type,
            self.facts["kv_cache"],
            callback=callback,
            on_pass=on_pass,
            make_decoder=make_decoder,
            saved=replace(self, facts=copy.deepcopy(self.facts), tensors=dict(self.tensors)),
        )
        session.changes = [
            PromptChange({"prompt_embeds": self.tensors[f"next_prompt.{index}"]}, how)
            for index, how in enumerate(self.facts["next_prompts"])
        ]
        return session

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
                    f"generator is on {generator.device.type}, expected one on {saved.device.type}, where {self.path} drew "
                    "its noise"
                )
            generator.set_state(saved.get_state())
            inputs = replace(inputs, generator=generator)
        return inputs

    @property
    def _inputs(self) -> StreamInputs:
        facts, tensors = self.facts["inputs"], self._part("inputs.")
        generators = []
        for index in range(sum(name.startswith("generator.") for name in tensors)):
            generators.append(torch.Generator(facts["generator_device"]))
            generators[-1].set_state(tensors[f"generator.{index}"])
        renoise = [
            tensors[f"renoise.{index}"] for index in range(sum(name.startswith("renoise.") for name in tensors))
        ]
        return StreamInputs(
            CausalFields.from_config(self.facts["fields"]),
            tuple(facts["shape"]),
            facts["num_chunks"],
            tensors.get("latents"),
            renoise or None,
            tensors.get("initial_latents"),
            generators[0] if facts["one_generator"] else generators,
        )

    def restore(self, loop: ChunkLoop, decoder: Decoder | None) -> None:
        """Put a fresh loop and decoder where the saved ones stood."""
        loop.load_state(self._part("loop."), self.facts["loop"])
        loop.cache.load_state(self._part("cache."), self.facts["cache"], loop.device)
        if decoder is not None:
            decoder.load_state_dict(self._part("decoder."))
        self.tensors.clear()  # on the device now

    def _part(self, prefix: str) -> Mapping[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
