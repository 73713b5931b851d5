"""Damage a file in one of many ways, chosen by a seeded generator: bytes, safetensors, JSON and torch files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
SIZES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
HUGE = (2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -1, -(2**31), 0)
VALUES = (None, True, False, 0, 1, -1, 3, 3.0, 0.5, 1e300, "", "text", "3", [], {}, [1], [[1]], {"a": 1}, *HUGE)
FLOATS = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1.0, 1e30, 1e-30)

Layout = list[tuple[str, dict[str, Any], bytes]]  # name, header entry without offsets, bytes


def mutate(path: Path, others: list[Path], rng: Random) -> str:
    """Damage one file in place; return what was done.

    Args:
        path: `.safetensors`, `.json`, or another file that is taken as one of torch.
        others: valid files of other kinds, to be put in its place.
        rng: decides everything.
    """
    draw = rng.random()
    if draw < 0.06:
        return _replace(path, others, rng)
    if draw < 0.25:
        return _bytes(path, rng)
    kinds = {".safetensors": _safetensors, ".json": _json_file}
    return kinds.get(path.suffix, _torch_file)(path, rng)


def _replace(path: Path, others: list[Path], rng: Random) -> str:
    """Put something else in the place of a file."""
    kind = rng.choice(("empty", "folder", "nowhere", "loop", "pipe", "valid", "valid", "valid"))
    content = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "nowhere":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        other = rng.choice(others)
        path.write_bytes(other.read_bytes() if other.is_file() else content)
        kind += f" {other.name}"
    return f"in its place: {kind}"


def _bytes(path: Path, rng: Random) -> str:
    """Flip, overwrite, remove, insert or append bytes; half of them in the first 2 KB, where headers are."""
    data = bytearray(path.read_bytes())
    end = min(len(data), 2048) if rng.random() < 0.5 else len(data)
    at, length = rng.randrange(end), rng.choice((1, 2, 8, 64, 512))
    kind = rng.choice(("flip", "flip", "range", "zeros", "ones", "truncate", "append", "remove", "insert", "length"))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind in ("range", "zeros", "ones"):
        fill = {"range": rng.randbytes(length), "zeros": bytes(length), "ones": b"\xff" * length}[kind]
        data[at : at + length] = fill[: len(data) - at]
    elif kind == "truncate":
        del data[at:]
    elif kind == "append":
        data += rng.choice((bytes(length), rng.randbytes(length), b" " * length))
    elif kind == "remove":
        del data[at : at + length]
    elif kind == "insert":
        data[at:at] = rng.randbytes(length)
    else:
        value = rng.choice((0, 1, 2, 7, len(data), len(data) - 8, 2**31, 2**63 - 1, 2**64 - 1, rng.randrange(4096)))
        data[:8] = value.to_bytes(8, "little")
    path.write_bytes(data)
    return f"bytes: {kind} at {at}, {length}"


# --- safetensors ---


def read_layout(path: Path) -> tuple[Layout, dict[str, str]]:
    """Read the tensors of a valid safetensors file as bytes, in the order of the file, and its texts."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    texts = header.pop("__metadata__", {})
    layout = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry.pop("data_offsets")
        layout.append((name, entry, data[start + begin : start + end]))
    return layout, texts


def _header(layout: Layout, texts: dict[str, str]) -> list[tuple[str, Any]]:
    """List the entries of a header with their offsets."""
    pairs: list[tuple[str, Any]] = [("__metadata__", texts)] if texts else []
    position = 0
    for name, entry, content in layout:
        pairs.append((name, {**entry, "data_offsets": [position, position + len(content)]}))
        position += len(content)
    return pairs


def _write(path: Path, pairs: list[tuple[str, Any]], layout: Layout) -> None:
    """Write a header of any entries, names given twice included, and the bytes."""
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}"
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(content for _, _, content in layout))


def _safetensors(path: Path, rng: Random) -> str:
    """Damage entries or values of a safetensors file, whose layout stays valid for about half of them."""
    layout, texts = read_layout(path)
    kind = rng.choice(
        ("header", "tensor", "value", "value", "value", "text") if texts else ("header", "tensor", "value")
    )
    if kind == "header":
        pairs = _header(layout, texts)
        done = _damage_header(pairs, rng)
    else:
        if kind == "text":
            name = rng.choice(sorted(texts))
            done = _damage_text(texts, name, rng)
        else:
            done = (_damage_layout if kind == "tensor" else _damage_value)(layout, rng)
        pairs = _header(layout, texts)
    _write(path, pairs, layout)
    return f"{kind}: {done}"


def _damage_header(pairs: list[tuple[str, Any]], rng: Random) -> str:
    """Change what a header says, and no bytes."""
    at = rng.choice([i for i, (name, _) in enumerate(pairs) if name != "__metadata__"])
    name, entry = pairs[at]
    kind = rng.choice(("dtype", "dtype", "same size", "shape", "offset", "twice", "rename", "remove", "swap", "entry"))
    size = SIZES.get(entry["dtype"], 1)
    if kind == "dtype":
        entry["dtype"] = rng.choice([*SIZES, "F4", "C64", "", None, 3])
    elif kind == "same size":
        entry["dtype"] = rng.choice([dtype for dtype, nbytes in SIZES.items() if nbytes == size])
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            (shape[::-1], [*shape, 1], [1, *shape], shape[1:], [], [rng.choice(HUGE), *shape], [-1, *shape], None,
             [float(s) for s in shape], [True, *shape], [str(s) for s in shape], [0, *shape], [2**32, 2**32])
        )  # fmt: skip
    elif kind == "offset":
        which, by = rng.randrange(2), rng.choice((1, -1, 4, -4, 2**31, 2**63, -(2**63)))
        entry["data_offsets"][which] += by
    elif kind == "twice":
        pairs.insert(rng.randrange(len(pairs) + 1), (name, pairs[rng.randrange(len(pairs))][1]))
    elif kind == "rename":
        pairs[at] = (_other_name(name, rng), entry)
    elif kind == "remove":
        del pairs[at]
    elif kind == "swap":
        other = rng.choice([i for i, (name, _) in enumerate(pairs) if name != "__metadata__"])
        pairs[at], pairs[other] = (name, pairs[other][1]), (pairs[other][0], entry)
    else:
        entry[rng.choice((*entry, "extra"))] = rng.choice(VALUES)
    return f"{kind} of {name}"


def _other_name(name: str, rng: Random) -> str:
    return rng.choice((f"{name}x", name[:-1], name.upper(), f"x.{name}", "", name.replace(".0.", ".1."), "\udcff"[:0]))


def _damage_text(texts: dict[str, str], name: str, rng: Random) -> str:
    """Damage one text of a header, most often as the JSON that it is."""
    kind = rng.choice(("json", "json", "json", "json", "remove", "type", "cut", "add"))
    if kind == "json":
        try:
            value = json.loads(texts[name])
        except ValueError:
            kind = "cut"
        else:
            texts[name], done = _damage_json(value, rng)
            return f"{name}: {done}"
    if kind == "remove":
        del texts[name]
    elif kind == "type":
        texts[name] = rng.choice(VALUES)
    elif kind == "cut":
        texts[name] = texts[name][: rng.randrange(len(texts[name]) + 1)]
    else:
        texts[f"{name}x"] = "more"
    return f"{kind} of {name}"


def _damage_layout(layout: Layout, rng: Random) -> str:
    """Remove, add, rename, swap, cast or reshape a tensor: the file stays a valid one."""
    at = rng.randrange(len(layout))
    name, entry, content = layout[at]
    kind = rng.choice(("remove", "add", "rename", "swap", "cast", "cast", "flatten", "cut", "grow", "empty"))
    if kind == "remove":
        del layout[at]
    elif kind == "add":
        layout.append((_other_name(name, rng), dict(entry), content))
    elif kind == "rename":
        layout[at] = (_other_name(name, rng), entry, content)
    elif kind == "swap":
        same = [i for i, (_, other, _) in enumerate(layout) if other == entry]
        other = rng.choice(same if rng.random() < 0.5 else range(len(layout)))
        layout[at], layout[other] = (name, *layout[other][1:]), (layout[other][0], entry, content)
    elif kind == "cast" and entry["dtype"] in DTYPES:
        dtype = rng.choice(sorted(DTYPES))
        tensor = _tensor(entry, content).to(DTYPES[dtype])
        layout[at] = (name, {**entry, "dtype": dtype}, _to_bytes(tensor))
    elif kind == "flatten":
        count = len(content) // SIZES.get(entry["dtype"], 1)
        layout[at] = (name, {**entry, "shape": rng.choice(([count], [count, 1], [1, count]))}, content)
    elif entry["shape"]:
        rows = entry["shape"][0]
        size = len(content) // max(rows, 1)
        keep = {"cut": rows // 2, "grow": rows * 2, "empty": 0}.get(kind, rows)
        layout[at] = (name, {**entry, "shape": [keep, *entry["shape"][1:]]}, (content * 2)[: keep * size])
    return f"{kind} of {name}"


def _tensor(entry: dict[str, Any], content: bytes) -> torch.Tensor:
    if not content:
        return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    return torch.frombuffer(bytearray(content), dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _damage_value(layout: Layout, rng: Random) -> str:
    """Change values of one tensor; one with few values as often as a large one."""
    at = rng.choice([i for i, (_, entry, content) in enumerate(layout) if content and entry["dtype"] in DTYPES])
    name, entry, content = layout[at]
    tensor = _tensor(entry, content)
    done = _damage_tensor(tensor, rng)
    layout[at] = (name, entry, _to_bytes(tensor))
    return f"{done} of {name}"


def _damage_tensor(tensor: torch.Tensor, rng: Random) -> str:
    """Change values of a tensor, in place."""
    flat = tensor.view(-1)
    where = slice(None) if rng.random() < 0.4 else slice(at := rng.randrange(len(flat)), at + rng.choice((1, 1, 4)))
    kind = rng.choice(("fill", "fill", "fill", "negate", "shuffle", "reverse", "duplicate", "off by one", "bits"))
    if kind == "fill" and tensor.is_floating_point():
        value = rng.choice(FLOATS)
        flat[where] = value
        kind = f"fill {value}"
    elif kind == "fill":
        info = torch.iinfo(tensor.dtype)
        value = rng.choice((0, 1, info.max, info.min, info.max - 1, len(flat), 127, max(-1, info.min)))
        flat[where] = min(max(value, info.min), info.max)
        kind = f"fill {value}"
    elif kind == "negate":
        flat[where] = -flat[where]
    elif kind == "shuffle":
        flat[:] = flat[torch.tensor(rng.sample(range(len(flat)), len(flat)))] if len(flat) < 10_000 else flat.roll(1)
    elif kind == "reverse":
        flat[:] = flat.flip(0)
    elif kind == "duplicate":
        flat[where] = flat[rng.randrange(len(flat))].clone()
    elif kind == "off by one":
        flat[where] += 1
    else:
        raw = flat.view(torch.uint8)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return kind


# --- JSON ---


def _json_file(path: Path, rng: Random) -> str:
    """Damage one value of a JSON file, or the way it is written."""
    text, done = _damage_json(json.loads(path.read_text(encoding="utf-8")), rng)
    encoding = "utf-8"
    if rng.random() < 0.04:
        encoding = rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1"))
        done += f", {encoding}"
    path.write_text(text + ("\xe4" if encoding == "latin-1" else ""), encoding=encoding)
    return f"json: {done}"


def _slots(value: Any) -> list[list[tuple[Any, Any]]]:
    """List every place in a JSON value as container and key, by depth."""
    found, level = [], [value] if isinstance(value, dict | list) else []
    while level:
        slots = [(each, key) for each in level for key in (each if isinstance(each, dict) else range(len(each)))]
        found.append(slots)
        level = [each[key] for each, key in slots if isinstance(each[key], dict | list)]
    return [slots for slots in found if slots]


def _damage_json(value: Any, rng: Random) -> tuple[str, str]:
    """Return the text of a damaged JSON value, and what was done."""
    levels = _slots(value)
    if not levels:
        return json.dumps(rng.choice(VALUES)), "a whole value"
    container, key = rng.choice(rng.choice(levels))
    old = container[key]
    kind = rng.choice(
        ("remove", "type", "type", "near", "near", "deep", "root", "extra", "literal", "twice", "rename")
    )
    if kind == "remove":
        del container[key]
    elif kind == "type":
        container[key] = rng.choice(VALUES)
    elif kind == "near":
        container[key] = _near(old, rng)
    elif kind == "deep":
        mark, depth = "deep mark", rng.choice((50, 1_000, 100_000))
        container[key] = mark
        brackets = "[" * depth + "]" * depth if rng.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
        return json.dumps(value).replace(json.dumps(mark), brackets), f"deep {depth} at {key!r}"
    elif kind == "root":
        return json.dumps(rng.choice([*VALUES, [value], {"a": value}])), "another root"
    elif kind == "extra" and isinstance(container, dict):
        container[rng.choice(("extra", "_class_name", "torch_dtype", "auto_map", "quantization_config"))] = rng.choice(
            VALUES
        )
    elif kind == "literal":
        container[key] = mark = "literal mark"
        literal = rng.choice(
            ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-0", "'a'", '"\\ud800"', "", "nul")
        )
        return json.dumps(value).replace(json.dumps(mark), literal), f"{literal[:10]} at {key!r}"
    elif kind == "twice" and isinstance(container, dict):
        container["key mark"] = rng.choice(VALUES)
        return json.dumps(value).replace('"key mark"', json.dumps(key)), f"{key!r} twice"
    elif kind == "rename" and isinstance(container, dict):
        del container[key]
        container[f"{key}x"] = old
    else:
        container[key] = [old]
    return json.dumps(value), f"{kind} of {key!r}"


def _near(old: Any, rng: Random) -> Any:
    """Return a value that is nearly the old one: another type of the same number, the next one, a longer list."""
    if isinstance(old, bool):
        return rng.choice((not old, int(old), str(old).lower(), None))
    if isinstance(old, int | float):
        choices = (old + 1, old - 1, -old, old * 2, float(old), bool(old), str(old), [old], old + 0.5, *HUGE)
        return rng.choice(choices)
    if isinstance(old, str):
        return rng.choice((f"{old}x", old[:-1], old.upper(), old.encode().hex(), f"../{old}", f"{old}\x00"))
    if isinstance(old, list):
        return rng.choice((old[:-1], [*old, *old], old[::-1], [*old, None], [[each] for each in old], tuple(old[:1])))
    if isinstance(old, dict):
        return rng.choice((list(old), list(old.items()), {**old, "extra": 1}, dict.fromkeys(old)))
    return rng.choice(VALUES)


# --- files of torch ---


def _torch_file(path: Path, rng: Random) -> str:
    """Change one entry of a saved state dict."""
    content = torch.load(path, weights_only=True)
    nested = rng.choice([each for each in [content, *content.values()] if isinstance(each, dict)])
    name = rng.choice(sorted(nested))
    value = nested[name]
    changes: dict[str, Callable[[], Any]] = {
        "object": lambda: rng.choice([*VALUES, "text", [value], (value,), {"a": {"b": value}}, {1: value}]),
        "remove": lambda: nested.pop(name),
        "rename": lambda: nested.__setitem__(_other_name(name, rng), nested.pop(name)),
        "key": lambda: nested.__setitem__(rng.choice((1, None, b"x", ("a",), 2.5)), value),
    }
    if isinstance(value, torch.Tensor):
        changes |= {
            "value": lambda: _damage_tensor(value, rng),
            "values": lambda: _damage_tensor(value, rng),
            "cast": lambda: nested.__setitem__(name, value.to(DTYPES[rng.choice(sorted(DTYPES))])),
            "complex": lambda: nested.__setitem__(name, value.to(torch.complex64)),
            "shape": lambda: nested.__setitem__(name, rng.choice((value.flatten(), value[None], value[:0], value.mT))
                                                if value.ndim > 1 else value[None]),
            "huge": lambda: nested.__setitem__(name, value.flatten()[:1].expand(2**40)),
            "sparse": lambda: nested.__setitem__(name, value.to_sparse()),
            "meta": lambda: nested.__setitem__(name, value.to("meta")),
        }  # fmt: skip
    kind = rng.choice(sorted(changes))
    done = changes[kind]()
    if kind == "object":
        nested[name] = done
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)
    return f"torch: {kind} of {name}" + (f" ({done})" if isinstance(done, str) else "")
