"""The architecture, checked: which room may import which, in every file, wherever in the file the import stands."""

import ast
import functools
import sys
from pathlib import Path

import forking
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"kvmix_cli": ROOT / "kvmix_cli", "kvmix_kernels": ROOT / "kernels" / "kvmix_kernels"}

FLOORS = [
    ["_version", "errors", "kvmix_kernels.layout"],
    [
        "counting",
        "extensions",
        "files",
        "garbage",
        "kvmix_kernels.transform_layout",
        "network",
        "proportions",
        "quiet",
        "ranks",
        "registry",
        "torchless",
        "turns",
    ],
    ["codecs"],
    ["plan.document"],
    ["plan.engines", "plan.tensors"],
    ["plan"],
    ["plan.presets"],
    ["journal", "profile", "state", "texts"],
    ["kvmix_kernels", "models.geometry", "models.memory"],
    ["cache"],
    ["models"],
    ["decoding", "serving"],
    ["profiling", "allocation", "export", "evaluation"],
    ["studies"],
    ["reporting"],
    ["reporting.tables"],
    ["reporting.plots"],
    ["reporting.page"],
    ["console"],
    ["commands"],
    ["main"],
    ["__main__"],
]
"""Rooms from the ground up. A file imports from its own room, and from rooms on strictly lower floors."""

ONLY = {"transformers.cache_utils": ("cache", "models", "models.geometry"), "rich": ("console",), "optimum": ()}
"""Modules of other projects that only some rooms may import."""

NO_TORCH = ["allocation", "commands", "console", "export", "main", "plan", "profile", "reporting", "state", "studies"]
"""Rooms whose files load neither torch nor transformers when they are imported."""


def module_files():
    """Return every module of ours, by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            if "assets" not in path.parts:
                parts = (package, *path.relative_to(folder).with_suffix("").parts)
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


FILES = module_files()
MODULES = [pytest.param(module, id=module) for module in FILES if module not in PACKAGES]


@functools.cache
def imports(module):
    """Return the full name and line of everything that a module imports: inside functions and for types, too."""
    return list(found_imports(module))


def found_imports(module):
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def own_imports(module):
    """Return the modules of ours that a module imports, each with a line."""
    found = {}
    for name, line in imports(module):
        target = name if name in FILES else name.rpartition(".")[0]
        if target in FILES and target != module and not module.startswith(f"{target}."):
            found[target] = line
    return found


def room_of(module):
    """Return the room of a module: the longest name in FLOORS that it begins with."""
    name = module.removeprefix("kvmix_cli.")
    rooms = [room for floor in FLOORS for room in floor if name == room or name.startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def floor_of(room):
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_imports_go_strictly_down(module):
    room = room_of(module)
    assert room is not None, f"{module} is in no room"
    wrong = [
        f"{FILES[module].relative_to(ROOT)}:{line} ({room}, floor {floor_of(room)}) imports {target} "
        f"({other}, floor {floor_of(other)})"
        for target, line in own_imports(module).items()
        if target not in PACKAGES and (other := room_of(target)) != room and floor_of(other) >= floor_of(room)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_between_files():
    edges = {module: list(own_imports(module)) for module in FILES}
    assert (circle := find_circle(edges)) is None, " -> ".join(circle)


def find_circle(edges):
    """Return a path of modules that ends where it began, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        found = next(filter(None, map(visit, edges[module])), None)
        path.pop()
        done.add(module)
        return found

    return next(filter(None, map(visit, edges)), None)


def test_a_circle_is_found():
    assert find_circle({"a": ["b"], "b": ["c"], "c": []}) is None
    assert find_circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]


@pytest.mark.parametrize("module", MODULES)
def test_one_owner_for_each_outside_thing(module):
    room, path = room_of(module), FILES[module]
    for name, line in imports(module):
        for prefix, owners in ONLY.items():
            allowed = not (name == prefix or name.startswith(f"{prefix}.")) or room in owners
            assert allowed, f"{path.relative_to(ROOT)}:{line} imports {name}; only {owners} may"
    text = path.read_text()
    assert "from_pretrained(" not in text or room == "models", f"{module}: only models/ loads models"
    assert "stdout.write" not in text or room == "console", f"{module}: only console.py prints"


@pytest.mark.slow
def test_no_torch_on_the_light_floors():
    """One process imports every module of the light rooms; none of them may load torch or transformers."""
    names = [module for module in FILES if (room_of(module) or "").partition(".")[0] in NO_TORCH]
    script = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    result = forking.run(code=script, imports=forking.LIGHT)
    assert result.returncode == 0, result.stderr


def test_nothing_shadows_the_kernels_of_hugging_face():
    """A package called `kernels` would be what transformers probes for, and its models would not import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert str(ROOT) in sys.path, "where Python looks when it is started in the checkout"
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM
