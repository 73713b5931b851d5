"""Select the Linears of a transformer to quantize, and group those that read the same tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..config import QARVDConfig, QuantizedModule, named_by
from ..quantization.linear import QARVDLinear
from ..quantization.model import unwrapped

# The family that the method was published for (arXiv 2605.21072): its chunk sensitivities were measured there, and its
# text embedding is quantized although it lies outside the blocks.
PUBLISHED_FAMILY = "WanTransformer3DModel"
_TEXT_EMBEDDING = "text_embedder"

OUTSIDE, ROUTER, BY_NAME = "outside the repeated blocks", "router of experts", "named by modules_to_not_convert"
ONCE = "runs once per chunk"


@dataclass(frozen=True, eq=False)
class Targets:
    """List what calibration quantizes in a transformer, and what is known about it.

    Attributes:
        linears: to quantize, by name and in module order.
        groups: partition of their names into layers that read one tensor; `dynamic` ones come last.
        kept: the other Linears, with the reason why they stay float.
        prompt: those that read the prompt alone.
        words: `prompt`, and those that read weighted means of what these put out.
        dynamic: those that read a few rows without tokens (modulation): their activations are quantized at run time.
        observed: whether a rollout has shown this, or it follows from the structure of the model.
    """

    linears: Mapping[str, nn.Linear]
    groups: Sequence[tuple[str, ...]]
    kept: Mapping[str, str]
    prompt: frozenset[str]
    words: frozenset[str]
    dynamic: frozenset[str] = frozenset()
    observed: bool = False

    @property
    def measured(self) -> list[tuple[str, ...]]:
        """The groups whose inputs are observed."""
        return [names for names in self.groups if names[0] not in self.dynamic]


def select(transformer: nn.Module, config: QARVDConfig) -> Targets:
    """Select what to quantize by the structure of the model.

    Raises:
        ValueError: see `quantizable_linears` and `input_groups`.
    """
    linears = quantizable_linears(transformer, config)
    groups = input_groups(transformer, linears, config)
    prompt, words = prompt_linears(transformer, linears), word_linears(transformer, linears)
    return Targets(linears, groups, kept_float(transformer, config), frozenset(prompt), frozenset(words))


def is_published_family(transformer: nn.Module) -> bool:
    """Tell whether a transformer is of the family that the method was published for."""
    return any(kind.__name__ == PUBLISHED_FAMILY for kind in type(unwrapped(transformer)).__mro__)


def repeated_blocks(transformer: nn.Module) -> tuple[str, ...]:
    """Find the lists of repeated blocks: of modules of one class. Names end in a dot.

    A list of a single module counts if the class of the model declares it (`_repeated_blocks` of diffusers).
    """
    declared = getattr(transformer, "_repeated_blocks", None) or ()
    found = []
    for name, module in transformer.named_modules():
        blocks = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        kinds = {type(block) for block in blocks}
        enough = len(blocks) > 1 or any(kind.__name__ in declared for kind in kinds)
        if len(kinds) == 1 and enough:
            found.append(f"{name}." if name else "")
    return tuple(found)


def kept_float(transformer: nn.Module, config: QARVDConfig) -> dict[str, str]:
    """List the Linears that stay float, with the reason: what lies outside the repeated blocks, routers, names, and
    parts that the class of the model declares to run once per chunk, and so to cost nothing.

    The error of a router, a Linear beside expert tensors, sends tokens to other experts.
    """
    transformer = unwrapped(transformer)
    blocks = repeated_blocks(transformer)
    chosen = (*config.modules_to_convert, *([_TEXT_EMBEDDING] if is_published_family(transformer) else []))
    # A list of experts is one tensor [experts, in, out] that is not the weight of a convolution.
    experts = [n for n, p in transformer.named_parameters() if p.ndim == 3 and len(p) > 1 and not n.endswith("weight")]
    routing = {name.rpartition(".")[0].rpartition(".")[0] for name in experts} - {""}
    kept = {}
    for name in base_linears(transformer):
        if any(named_by(name, pattern) for pattern in config.modules_to_not_convert):
            kept[name] = BY_NAME
        elif any(named_by(name, pattern) for pattern in chosen):
            continue
        elif any(named_by(name, part) for part in getattr(transformer, "_runs_once_a_chunk", ())):
            kept[name] = ONCE
        elif not name.startswith(blocks):
            kept[name] = OUTSIDE
        elif name.rpartition(".")[0] in routing:
            kept[name] = ROUTER
    return kept


def quantizable_linears(transformer: nn.Module, config: QARVDConfig) -> dict[str, nn.Linear]:
    """Select the Linears that `config` quantizes, by name and in module order.

    That is every Linear but those of `kept_float`.

    Raises:
        ValueError: there is none, the model has no repeated blocks or is quantized already, an entry of
            `modules_to_not_convert`, `modules_to_convert` or `module_bits` names no module, or a layer's odd number of
            input channels has no 4-bit layout.
    """
    names = [name for name, _ in transformer.named_modules() if name]
    for field in ("modules_to_not_convert", "modules_to_convert", "module_bits"):
        unknown = [p for p in getattr(config, field) or () if not any(named_by(name, p) for name in names)]
        if unknown:
            raise ValueError(
                f"{field} names {unknown}, which no module of {type(transformer).__name__} is called; "
                f"names look like {names[-1]!r} and may be shortened to whole parts of it"
            )
    kept = kept_float(transformer, config)
    linears = {name: module for name, module in base_linears(transformer).items() if name not in kept}
    if not linears and not repeated_blocks(unwrapped(transformer)):
        raise ValueError(
            f"{type(transformer).__name__} has no repeated blocks (a list of modules of one class), whose Linears are "
            "quantized: pass the transformer itself, or name Linears in modules_to_convert"
        )
    if not linears:
        raise ValueError(
            f"{type(transformer).__name__} has no Linear to quantize beside {sorted(set(kept.values()))}: pass the "
            "transformer itself, and look at modules_to_not_convert and modules_to_convert"
        )
    done = [name for name, module in linears.items() if isinstance(module, QARVDLinear)]
    if done:
        raise ValueError(f"{len(done)} layers are quantized already (first: {done[0]}): quantize the float model")
    odd = [name for name, module in linears.items() if module.in_features * config.scheme_of(name).weight_bits % 8]
    if odd:
        raise ValueError(
            f"{odd[0]} has {linears[odd[0]].in_features} input channels, an odd number, which has no 4-bit layout: "
            f"add {odd} to modules_to_not_convert, or use an 8-bit scheme"
        )
    return linears


def base_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Find every Linear of the model by name; adapters do not count, and names omit them and `torch.compile`.

    Raises:
        ValueError: a part of the model is wrapped by `torch.compile`.
    """
    transformer = unwrapped(transformer)
    wrapped = next((name for name, _ in transformer.named_modules() if "_orig_mod" in name.split(".")), None)
    if wrapped is not None:
        raise ValueError(
            f"{wrapped.partition('._orig_mod')[0]} is wrapped by torch.compile(), which changes the names of its "
            "layers: call its compile() method, or the model's compile_repeated_blocks(), instead"
        )
    wrappers = {name for name, module in transformer.named_modules() if hasattr(module, "base_layer")}
    linears = {}
    for name, module in transformer.named_modules():
        owner = next((wrapper for wrapper in wrappers if name.startswith(f"{wrapper}.")), None)
        if isinstance(module, nn.Linear) and owner is None:
            linears[name] = module
        elif isinstance(module, nn.Linear) and name == f"{owner}.base_layer":
            linears[owner] = module
    return linears


def input_groups(transformer: nn.Module, names: Iterable[str], config: QARVDConfig) -> list[tuple[str, ...]]:
    """Partition layer names into those that read one tensor: q, k and v of self-attention, k and v of cross-attention.

    Every group shares its outlier channels and its activation quantizer, so that a kernel quantizes the tensor once.
    Where the recipe does not tie inputs, every layer is a group of its own.

    Raises:
        ValueError: `config.module_bits` gives layers of one group different bits.
    """
    leader = {name: name for name in names}
    if config.recipe.tie_inputs:
        for path, module in transformer.named_modules():
            for attributes in _tied_attributes(module):
                tied = [name for name in (f"{path}.{a}".lstrip(".") for a in attributes) if name in leader]
                leader.update(dict.fromkeys(tied, tied[0] if tied else None))
    return partition(leader, config)


def partition(leader: Mapping[str, str], config: QARVDConfig) -> list[tuple[str, ...]]:
    """Group layers by their leaders, which come first in their groups.

    Raises:
        ValueError: see `input_groups`.
    """
    groups: dict[str, list[str]] = {}
    for name in leader:
        group = groups.setdefault(leader[name], [leader[name]])
        group.extend([name] if name != leader[name] else [])
    for group in groups.values():
        bits = {name: config.scheme_of(name).weight_bits for name in group}
        if len(set(bits.values())) > 1:
            raise ValueError(
                f"module_bits gives {bits}, but these layers read one tensor and are calibrated as one: give them "
                "the same bits, or set tie_inputs=False"
            )
    return [tuple(group) for group in groups.values()]


def describe(
    linears: Mapping[str, nn.Linear],
    groups: Iterable[Sequence[str]],
    config: QARVDConfig,
    dynamic: Collection[str] = (),
) -> dict[str, QuantizedModule]:
    """Describe how every layer will compute, before its outlier channels are known.

    With `Recipe.token_scales` a layer whose input has a scale per token needs that input as a whole row. The input of
    a layer with fewer outputs than inputs (the second one of a feed-forward network) is written in pieces, by the
    product before it: it stays static where ranges are calibrated.

    Args:
        linears: layers by name.
        groups: their partition into layers that read one tensor.
        config: scheme and recipe.
        dynamic: names of layers whose inputs are not observed.
    """
    recipe, described = config.recipe, {}
    for names in groups:
        channels, outputs = linears[names[0]].in_features, sum(linears[name].out_features for name in names)
        for name in names:
            scheme = config.scheme_of(name)
            activation = "dynamic" if scheme.needs_calibration and name in dynamic else scheme.activation
            if recipe.token_scales and (activation == "dynamic" or (activation == "static" and channels <= outputs)):
                activation = "token"
            rotated = activation == "token" and scheme.weight_bits == 8
            rotation = math.gcd(channels, recipe.rotation) if rotated else 1
            group = recipe.group if scheme.weight_bits == 4 and channels % (recipe.group or 1) == 0 else 0
            described[name] = QuantizedModule(0, scheme.weight_bits, activation, rotation, group)
    return described


def rotations_of(described: Mapping[str, QuantizedModule]) -> dict[str, int]:
    """Select the layers whose activations have a scale per token, with the channels of a block that is rotated."""
    return {name: module.rotation for name, module in described.items() if module.activation == "token"}


def skips_rounding(name: str, config: QARVDConfig) -> bool:
    """Tell whether a layer is rounded to nearest whatever `config.rounding` says."""
    return any(named_by(name, pattern) for pattern in config.resolved_rounding_skips)


def prompt_linears(transformer: nn.Module, names: Iterable[str]) -> set[str]:
    """Select the names that read the prompt alone: text embedding and the K/V of cross-attention.

    Their output is cached in the first pass of a rollout and read in every later one: it belongs to no chunk.
    """
    embedding = {name for name in names if named_by(name, _TEXT_EMBEDDING)}
    return embedding | _in_cross_attention(transformer, names, ("to_k", "to_v", "add_k_proj", "add_v_proj"))


def word_linears(transformer: nn.Module, names: Iterable[str]) -> set[str]:
    """Select `prompt_linears` and what reads the output of cross-attention: weighted means of prompt values."""
    return prompt_linears(transformer, names) | _in_cross_attention(transformer, names, ("to_out.0",))


def _in_cross_attention(transformer: nn.Module, names: Iterable[str], attributes: Iterable[str]) -> set[str]:
    paths = [
        path
        for path, module in transformer.named_modules()
        if _is_linear(getattr(module, "to_q", None)) and _reads_prompt(module)
    ]
    return {f"{path}.{attribute}".lstrip(".") for path in paths for attribute in attributes} & set(names)


def repeated_name(name: str) -> str:
    """Replace the first number of a name, that of the block: the result is equal for the same layer of every block."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join([*parts[:number], "*", *parts[number + 1 :]])


def _tied_attributes(module: nn.Module) -> list[tuple[str, ...]]:
    """Name the projections that read one tensor, in diffusers' attention modules."""
    query, key = getattr(module, "to_q", None), getattr(module, "to_k", None)
    if not _is_linear(query) or not _is_linear(key):
        return []
    return [("to_k", "to_v") if _reads_prompt(module) else ("to_q", "to_k", "to_v"), ("add_k_proj", "add_v_proj")]


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(getattr(module, "base_layer", module), nn.Linear)


def _reads_prompt(attention: nn.Module) -> bool:
    """Tell whether K and V of a diffusers attention module come from the prompt."""
    return getattr(attention, "is_cross_attention", attention.to_q.in_features != attention.to_k.in_features)
