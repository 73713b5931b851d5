"""Select the Linears of a transformer to quantize, and group those that read the same tensor."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..config import QARVDConfig, named_by
from ..quantization.linear import QARVDLinear
from ..quantization.model import unwrapped

# Outside the blocks, only the text embedding is quantized: the rest is small, and the whole video depends on it.
KEEP_FLOAT = ("time_embedder", "time_proj", "image_embedder", "patch_embedding", "norm_out", "proj_out")
_TEXT_EMBEDDING = "text_embedder"


def quantizable_linears(transformer: nn.Module, config: QARVDConfig) -> dict[str, nn.Linear]:
    """Select the Linears that `config` quantizes, by name and in module order.

    That is every Linear but those of `KEEP_FLOAT` (time embedding, output head and the like) and of
    `config.modules_to_not_convert`.

    Raises:
        ValueError: there is none, the model is quantized already, an entry of `modules_to_not_convert` or
            `module_bits` names no module, or a layer's odd number of input channels has no 4-bit layout.
    """
    names = [name for name, _ in transformer.named_modules() if name]
    for field in ("modules_to_not_convert", "module_bits"):
        unknown = [p for p in getattr(config, field) or () if not any(named_by(name, p) for name in names)]
        if unknown:
            raise ValueError(
                f"{field} names {unknown}, which no module of {type(transformer).__name__} is called; "
                f"names look like {names[-1]!r} and may be shortened to whole parts of it"
            )
    skipped = (*KEEP_FLOAT, *config.modules_to_not_convert)
    linears = {
        name: module
        for name, module in base_linears(transformer).items()
        if not any(named_by(name, pattern) for pattern in skipped)
    }
    if not linears:
        raise ValueError(
            f"{type(transformer).__name__} has no Linear to quantize beside {list(skipped)}: pass the transformer "
            "itself, and look at modules_to_not_convert"
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
    names = list(names)
    leader = {name: name for name in names}
    if config.recipe.tie_inputs:
        for path, module in transformer.named_modules():
            for attributes in _tied_attributes(module):
                tied = [name for name in (f"{path}.{a}".lstrip(".") for a in attributes) if name in leader]
                leader.update(dict.fromkeys(tied, tied[0] if tied else None))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(leader[name], []).append(name)
    for group in groups.values():
        bits = {name: config.scheme_of(name).weight_bits for name in group}
        if len(set(bits.values())) > 1:
            raise ValueError(
                f"module_bits gives {bits}, but these layers read one tensor and are calibrated as one: give them "
                "the same bits, or set tie_inputs=False"
            )
    return [tuple(group) for group in groups.values()]


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
