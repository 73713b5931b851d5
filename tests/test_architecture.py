"""The house rules: imports go strictly downward, importing does nothing, no folder shadows another package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qarvd_diffusers"

# Top to bottom; a module imports only from layers below its own, or from its own folder.
LAYERS = [
    {"__main__"},
    {"__init__", "cli"},
    {"hub", "evaluation", "bench"},
    {"pipelines"},
    {"quantizer"},
    {"serialization", "conversion", "model_card"},
    {"calibration", "presets"},
    {"linear", "models", "schedulers"},
    {"config", "primitives", "packing", "bundled", "tensor_files", "text_files", "weight_view"},
]
RANK = {name: len(LAYERS) - depth for depth, names in enumerate(LAYERS) for name in names}
# The root registers with diffusers; type checking and lazy names reach everything.
ROOT_MAY_IMPORT = {"quantizer"}
SAME_LAYER = {
    ("bundled", "config"),
    ("text_files", "config"),
    ("primitives", "packing"),
    ("hub", "evaluation"),
    ("conversion", "serialization"),
    ("conversion", "model_card"),
    ("models", "linear"),
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def runtime_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Imports anywhere in a module, inside functions too, except below `if TYPE_CHECKING`."""
    found, queue = [], [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        queue.extend(ast.iter_child_nodes(node))
    return found


def imported_rooms(path: Path) -> set[str]:
    package = ["qarvd_diffusers", *path.relative_to(PACKAGE).parent.parts]
    rooms = set()
    for node in runtime_imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            module = node.module.split(".") if node.module else []
            names = [base + module + ([] if module else [alias.name]) for alias in node.names]
        rooms |= {parts[1] for parts in names if parts[0] == "qarvd_diffusers" and len(parts) > 1}
    return rooms


def test_imports_go_strictly_downward():
    faults = []
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        for other in imported_rooms(path) - {room}:
            if room == "__init__":
                allowed = other in ROOT_MAY_IMPORT
            else:
                allowed = RANK[other] < RANK[room] or (room, other) in SAME_LAYER
            if not allowed:
                faults.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not faults, faults


def test_operators_import_only_torch_and_the_standard_library():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in (ROOT / "kernels" / "torch-ext").rglob("*.py"):
        for node in runtime_imports(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {name.split(".")[0] for name in names} <= allowed, (path, names)


def run(code: str, cwd: Path | str = "/") -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_does_nothing():
    """Nothing beyond torch and diffusers; no CUDA, seed, logging configuration, network or module of ours but the hook."""
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
    assert report["modules"] == ["qarvd_diffusers", "qarvd_diffusers.config", "qarvd_diffusers.quantizer"]


def test_public_names_resolve():
    import qarvd_diffusers

    for name in qarvd_diffusers.__all__:
        assert getattr(qarvd_diffusers, name) is not None


def test_kernels_folder_does_not_shadow_the_pypi_package():
    """diffusers and transformers probe for a package named `kernels`; what they see must not change at the root."""
    code = """
import importlib.util, qarvd_diffusers
from diffusers.utils import is_kernels_available
from transformers.utils import is_kernels_available as in_transformers
print(is_kernels_available(), in_transformers())
"""
    assert run(code, cwd=ROOT) == run(code)
    outside = run("import qarvd_diffusers, sys; print([p for p in sys.path if p])")
    assert str(ROOT) not in [str(Path(p)) for p in eval(outside)]
    assert not list((ROOT / "kernels").glob("__init__.py"))
