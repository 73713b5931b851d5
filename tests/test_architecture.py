"""The house rules: imports go strictly downward, importing does nothing, no folder shadows another package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

# Modules of version 0.1 and what users imported from them.
OLD_PATHS = {
    "linear": ["QARVDLinear", "LinearQParams"],
    "serialization": ["quantized_linears", "stored_bytes", "atomic_directory"],
    "models.kv_cache": ["KVCache"],
    "models.causal_fields": ["CausalFields"],
    "pipelines.stream": ["Stream"],
    "pipelines.memory": ["estimate"],
    "presets": ["PRESETS"],
}

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qarvd_diffusers"

# Top to bottom; a module imports only from rooms below its own, or from its own. Type checking and imports inside
# functions count.
ROOMS = (
    "__main__",
    "cli",
    "bench",
    "evaluation",
    "pipelines",
    "quantizer",
    "memory",
    "conversion",
    "hub",
    "calibration",
    "models",
    "rollout",
    "controls",
    "schedulers",
    "vae",
    "kv_cache",
    "quantization",
    "bundled",
    "config",
    "schemes",
    "files",
)
ROOT_MAY_IMPORT = {"quantizer", "moved"}  # at run time; its type-checking imports give the public names


def name_of(path: Path) -> str:
    """Dotted name of a module below the package; empty for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts}


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports(tree: ast.AST, typing: bool = True) -> list[ast.Import | ast.ImportFrom]:
    """Imports anywhere in a module, inside functions too; those below `if TYPE_CHECKING` if `typing`."""
    found, queue = [], [tree]
    while queue:
        node = queue.pop()
        if not typing and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        queue.extend(ast.iter_child_nodes(node))
    return found


def imported_modules(name: str, typing: bool = True) -> set[str]:
    """Modules of the package that a module imports."""
    path = MODULES[name]
    package = ["qarvd_diffusers", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in imports(ast.parse(path.read_text(encoding="utf-8")), typing):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [[*base, *(node.module or "").split("."), alias.name] for alias in node.names]
        for parts in names:
            parts = [part for part in parts if part]
            if parts[0] != "qarvd_diffusers":
                continue
            dotted = ".".join(parts[1:])
            found.add(dotted if dotted in MODULES else dotted.rpartition(".")[0])
    return found - {name, ""}


def test_every_room_exists_and_has_a_place():
    assert {room_of(name) for name in MODULES} - {"", "moved"} == set(ROOMS)


def test_tests_mirror_the_rooms():
    tests = ROOT / "tests"
    folders = {path.parent.name for path in tests.glob("*/test_*.py")}
    files = {path.stem.removeprefix("test_") for path in tests.glob("test_*.py")}
    assert folders <= {*ROOMS, "comfyui", "kernels"}
    assert files <= {*ROOMS, "architecture", "markdown"}


def test_imports_go_strictly_downward():
    faults = []
    for name in MODULES:
        allowed = (
            ROOT_MAY_IMPORT if name == "" else set(ROOMS[ROOMS.index(room_of(name)) :]) if name != "moved" else set()
        )
        faults += [
            f"{name or '__init__'} imports {other}"
            for other in imported_modules(name, typing=name != "")
            if room_of(other) not in allowed
        ]
    assert not faults, faults


def test_no_circles():
    """Of any kind, inside a room and for type checking too."""
    graph = {name: imported_modules(name) & MODULES.keys() for name in MODULES if name}
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in or above a circle: {sorted(graph)}"


def test_operators_import_only_torch_and_the_standard_library():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in (ROOT / "kernels" / "torch-ext").rglob("*.py"):
        for node in imports(ast.parse(path.read_text(encoding="utf-8")), typing=False):
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {name.split(".")[0] for name in names} <= allowed, (path, names)


def run(code: str, cwd: Path | str = "/") -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_does_nothing():
    """Loads only torch and diffusers; no CUDA, seed, logging set-up, network or module of ours but the hook."""
    report = json.loads(
        run(
            """
import json, logging, socket, sys, random
import torch, diffusers.quantizers.auto
socket.socket = None
state, python_state, handlers = torch.get_rng_state(), random.getstate(), list(logging.getLogger().handlers)
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
before = set(sys.modules)
import qarvd_diffusers
print(json.dumps({
    "cuda": torch.cuda.is_initialized(),
    "rng": bool((state == torch.get_rng_state()).all()) and python_state == random.getstate(),
    "logging": handlers == list(logging.getLogger().handlers),
    "torch": (threads, str(dtype)) == (torch.get_num_threads(), str(torch.get_default_dtype())),
    "registered": "qarvd" in diffusers.quantizers.auto.AUTO_QUANTIZER_MAPPING,
    "modules": sorted(set(sys.modules) - before),
}))
"""
        )
    )
    assert not report["cuda"]
    assert report["rng"] and report["logging"] and report["torch"] and report["registered"]
    assert report["modules"] == [
        "qarvd_diffusers",
        "qarvd_diffusers.config",
        "qarvd_diffusers.files",
        "qarvd_diffusers.files.schema",
        "qarvd_diffusers.files.text",
        "qarvd_diffusers.moved",
        "qarvd_diffusers.quantizer",
        "qarvd_diffusers.schemes",
    ]


def test_public_names_resolve():
    import qarvd_diffusers

    for name in qarvd_diffusers.__all__:
        assert getattr(qarvd_diffusers, name) is not None


def test_kernels_folder_does_not_shadow_the_pypi_package():
    """diffusers and transformers probe for a package named `kernels`; what they see must not change at the root."""
    code = """
import json, sys, qarvd_diffusers
from diffusers.utils import is_kernels_available
from transformers.utils import is_kernels_available as in_transformers
print(json.dumps([[is_kernels_available(), in_transformers()], [path for path in sys.path if path]]))
"""
    seen_at_root, _ = json.loads(run(code, cwd=ROOT))
    seen_outside, search_path = json.loads(run(code))
    assert seen_at_root == seen_outside
    assert str(ROOT) not in [str(Path(path)) for path in search_path]
    assert not list((ROOT / "kernels").glob("__init__.py"))


def test_import_paths_of_0_1_still_work():
    """With a warning that names the new place, and the same objects; each imported before anything else of ours."""
    code = f"""
import importlib, json, sys, warnings
report = {{}}
for old, names in {OLD_PATHS!r}.items():
    for loaded in [name for name in sys.modules if name.split(".")[0] == "qarvd_diffusers"]:
        del sys.modules[loaded]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module("qarvd_diffusers." + old)
    new = [sys.modules["qarvd_diffusers." + name] for name in sys.modules["qarvd_diffusers.moved"].MOVED[old]]
    report[old] = {{
        "warnings": [str(w.message) for w in caught if w.category is DeprecationWarning],
        "new": [part.__name__ for part in new],
        "names": [n for n in names if any(getattr(module, n) is getattr(part, n, None) for part in new)],
    }}
print(json.dumps(report))
"""
    report = json.loads(run(code))
    for old, names in OLD_PATHS.items():
        expected = f"qarvd_diffusers.{old} moved: import from {' or '.join(report[old]['new'])} instead"
        assert expected in report[old]["warnings"], old
        assert report[old]["names"] == names, old
