"""The architecture, checked: who may import whom, and who must not load torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"kvmix_cli": ROOT / "kvmix_cli", "kvmix_kernels": ROOT / "kernels" / "kvmix_kernels"}

FLOORS = [
    {
        "kvmix_kernels",
        "errors",
        "files",
        "windows",
        "axes",
        "settings",
        "forms",
        "plan",
        "preset",
        "profile",
        "budget",
        "noise",
    },
    {"models", "geometry", "cache", "texts", "losses", "console", "state"},
    {"profiling", "allocation", "generation", "evaluation", "export"},
    {"commands"},
    {"main"},
]
SIBLINGS_APART = FLOORS[2]
NO_TORCH = [
    "main",
    "console",
    "state",
    "errors",
    "files",
    "windows",
    "axes",
    "settings",
    "forms",
    "plan",
    "preset",
    "profile",
    "budget",
    "noise",
    "allocation",
    "export",
]
ONLY = {
    "transformers.cache_utils": "cache",
    "optimum": "evaluation",
}


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def modules():
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            if "assets" in path.parts:
                continue
            relative = path.relative_to(folder)
            yield package, relative, path


def room_of(package: str, relative: Path) -> str:
    return "kvmix_kernels" if package == "kvmix_kernels" else relative.parts[0].removesuffix(".py")


def imports(package: str, relative: Path, path: Path):
    """Absolute names of everything a file imports, wherever in the file."""
    parents = [package, *relative.parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


CASES = [pytest.param(*case, id=str(case[1])) for case in modules() if case[1] != Path("__init__.py")]


@pytest.mark.parametrize(("package", "relative", "path"), CASES)
def test_imports_only_go_down(package, relative, path):
    room = room_of(package, relative)
    for name in imports(package, relative, path):
        parts = name.split(".")
        if parts[0] not in PACKAGES or (parts[0] == "kvmix_cli" and parts[1] == "__version__"):
            continue
        other = "kvmix_kernels" if parts[0] == "kvmix_kernels" else parts[1]
        if other == room:
            continue
        assert floor_of(other) <= floor_of(room), f"{relative} is on a lower floor than {name}"
        assert not {room, other} <= SIBLINGS_APART, f"{relative} imports its sibling {name}"


@pytest.mark.parametrize(("package", "relative", "path"), CASES)
def test_one_owner_for_each_outside_thing(package, relative, path):
    room = room_of(package, relative)
    for name in imports(package, relative, path):
        for prefix, owner in ONLY.items():
            assert not name.startswith(prefix) or room == owner, f"{relative} imports {name}; only {owner}/ may"
    text = path.read_text()
    assert "from_pretrained(" not in text or room == "models", f"{relative}: only models.py loads models"
    assert "stdout.write" not in text or room == "console", f"{relative}: only console.py prints"


@pytest.mark.parametrize("module", [f"kvmix_cli.{name}" for name in NO_TORCH] + ["kvmix_kernels", "kvmix_cli"])
def test_no_torch_on_the_light_floors(module):
    script = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_no_torch_in_any_file_of_the_light_folders():
    folders = [PACKAGES["kvmix_cli"] / name for name in ("allocation", "export", "commands")]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for f in folders for p in sorted(f.rglob("*.py"))]
    script = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_nothing_shadows_the_kernels_of_hugging_face():
    """A package called `kernels` would be what transformers probes for, and its models would not import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    script = "from transformers import LlamaForCausalLM"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=ROOT).returncode == 0


def test_files_stay_small():
    long = {
        str(relative): lines for _, relative, path in modules() if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long
