"""Find the Wan network in a file: at any nesting of state dicts, after any prefix, among other saved entries."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .names import original_names, without_wrappers

_PREFIXES = ("generator_ema", "generator")  # nestings that flat files have as a prefix of every key
_COUNTER = re.compile(r"(.*\.)?(freqs\w*|\w*steps?|epochs?|iterations?|num_updates|n_averaged|scaled_fp8)")
_IN_BLOCKS = re.compile(r"blocks\.\d+\.")

StateDict = Mapping[str, Any]


def state_dicts(content: StateDict) -> dict[str | None, StateDict]:
    """Return all state dicts in a file's content by name (`generator`, `generator.model`), None for top-level entries.

    Keys of one dict that begin with `generator.` or `generator_ema.` count as state dicts too, as do several networks
    with different prefixes. Entries that are not tensors are kept.
    """
    found: dict[str | None, StateDict] = {}
    _collect(content, None, found)
    return {name: part for owner, state_dict in found.items() for name, part in _by_prefix(owner, state_dict).items()}


def _collect(content: StateDict, name: str | None, found: dict[str | None, StateDict]) -> None:
    """Add a mapping's own entries to `found`, and those of the mappings in it under dotted names."""
    nested = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    flat = {key: _as_tensor(key, value) for key, value in content.items() if key not in nested}
    if any(isinstance(value, torch.Tensor) for value in flat.values()) or not (nested or name):
        found[name] = flat
    for key, value in nested.items():
        if isinstance(key, str):  # the state of an optimizer is numbered
            _collect(value, key if name is None else f"{name}.{key}", found)


def _as_tensor(key: Any, value: Any) -> Any:
    """Turn an adapter's alpha, a plain number in some files, into a tensor; return other values unchanged."""
    number = isinstance(value, int | float) and str(key).endswith(".alpha")
    return torch.tensor(float(value)) if number else value


def _by_prefix(owner: str | None, state_dict: StateDict) -> dict[str | None, StateDict]:
    """Split a state dict whose keys have the prefixes of several networks."""
    names = original_names(key for key in state_dict if isinstance(key, str))
    networks = {prefix for prefix, name in names.values() if _IN_BLOCKS.match(name)}
    firsts = {prefix.partition(".")[0] for prefix in networks} - {""} if len(networks) > 1 else set()
    if owner is None:
        firsts |= set(_PREFIXES)
    found: dict[str | None, dict[str, Any]] = {}
    for key, value in state_dict.items():
        first, dot, rest = str(key).partition(".")
        if dot and first in firsts:
            found.setdefault(first if owner is None else f"{owner}.{first}", {})[rest] = value
        else:
            found.setdefault(owner, {})[key] = value
    return found or {owner: {}}


def is_network(keys: Sequence[str]) -> bool:
    """Tell whether at least half of a state dict's keys are original names of a Wan transformer."""
    return 0 < len(keys) <= 2 * len(original_names(keys))


def choose(found: Mapping[str | None, StateDict], weights: str | None, nestings: Sequence[str]) -> str | None:
    """Return the name of the state dict to use.

    Args:
        found: from `state_dicts`.
        weights: requested name, or the first or last part of it.
        nestings: names in order of preference, if none is requested.

    Raises:
        KeyError: if the requested one does not exist.
        ValueError: if there are several networks, and none is preferred.
    """
    names = [name for name in found if name is not None]
    if weights is not None:
        return _requested(names, weights)
    preferred = (name for wish in nestings for name in names if name == wish or name.startswith(f"{wish}."))
    if (chosen := next(preferred, None)) is not None:
        return chosen
    networks = [name for name, part in found.items() if is_network(tensors_of(part))]
    if len(networks) > 1:
        raise ValueError(f"holds several networks {networks}: select one with weights=")
    if networks:
        return networks[0]
    return None if None in found or len(names) != 1 else names[0]


def _requested(names: Sequence[str], weights: str) -> str:
    """Return the one of several names that is requested by itself, its first or its last part."""
    exact = [name for name in names if name == weights]
    matches = exact or [name for name in names if name.startswith(f"{weights}.") or name.endswith(f".{weights}")]
    if len(matches) != 1:
        raise KeyError(f"has no state dict {weights!r}; it holds {names or 'flat tensors'}")
    return matches[0]


def tensors_of(state_dict: StateDict) -> list[str]:
    """List the keys whose values are tensors."""
    return [key for key, value in state_dict.items() if isinstance(value, torch.Tensor) and isinstance(key, str)]


def own_keys(state_dict: StateDict) -> tuple[list[str], list[str]]:
    """List the keys of a state dict to read, and sentences that say what is left out.

    Left out are entries that are not tensors. In a network, so are buffers and counters, and keys without the prefix
    that all parameters have. Other unknown keys are kept, so that the error for them names them.
    """
    keys, reasons = tensors_of(state_dict), []
    if others := [str(key) for key in state_dict if key not in set(keys)]:
        reasons.append(f"left out: {others[:5]} ({len(others)} in all), not tensors")
    if not is_network(keys):
        return keys, reasons
    names = original_names(keys)
    counters = [key for key in keys if key not in names and _is_counter(key, state_dict[key])]
    if reported := [key for key in counters if not key.endswith("scaled_fp8")]:
        reasons.append(
            f"left out: {reported[:5]} ({len(reported)} in all), counters and buffers that are not parameters"
        )
    prefix = collections.Counter(prefix for prefix, _ in names.values()).most_common(1)[0][0]
    first, dot, _ = prefix.partition(".")
    outside = [
        key
        for key in keys
        if key not in names and key not in set(counters) and not without_wrappers(key).startswith(first + dot)
    ]
    if outside:
        firsts = sorted({key.partition(".")[0] for key in outside})
        reasons.append(
            f"left out: {len(outside)} tensors without the prefix {prefix!r}, of other networks: {firsts[:5]}"
        )
    left_out = {*counters, *outside}
    return [key for key in keys if key not in left_out], reasons


def _is_counter(key: str, tensor: torch.Tensor) -> bool:
    return bool(_COUNTER.fullmatch(key)) or (tensor.numel() <= 1 and not _IN_BLOCKS.search(key))
