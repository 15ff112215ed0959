"""Everything that has a name, by kind, with one line each. No torch: what a probe or a task is, its source says.

Entries are read from the source of their registry, since importing some of them would load torch.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import state
from ..errors import DocumentError, StateError, did_you_mean
from ..plan import Plan
from ..plan.presets import presets

PACKAGE = Path(__file__).parents[1]
_SENTENCE = re.compile(r"(.+?)(?:\.(?=\s)|\.?$)", re.DOTALL)


@dataclass(frozen=True)
class ListedItem:
    """Something that has a name.

    Attributes:
        name: as options take it.
        summary: what it is, in one line.
        more: other facts, as plain data.
    """

    name: str
    summary: str
    more: tuple[tuple[str, Any], ...] = ()


def list_items(kind: str, model: str | None = None) -> list[ListedItem]:
    """Return everything of a kind.

    Args:
        model: of plans, the model whose plans are wanted; None for all.

    Raises:
        StateError: for an unknown kind.
    """
    if kind not in _KINDS:
        raise StateError(f"no kind '{kind}'{did_you_mean(kind, _KINDS)}; there are {', '.join(_KINDS)}")
    found = list(_KINDS[kind]())
    return [each for each in found if model is None or dict(each.more).get("model", model) == model]


def kinds() -> tuple[str, ...]:
    """Return the kinds of things that there are."""
    return tuple(_KINDS)


def first_sentence(text: str) -> str:
    """Return the first sentence of a text on one line, without its period."""
    match = _SENTENCE.match(" ".join(text.split()))
    return match[1] if match else ""


def _models() -> Iterator[ListedItem]:
    """Yield built-in models, models with a profile or plans, and those in the hub's cache."""
    from huggingface_hub import constants

    from ..models.sources import ASSETS, BUILTIN

    named = set()
    for path in sorted(ASSETS.glob("*/config.json")):
        readme = (path.parent / "README.md").read_text(encoding="utf-8").partition("\n\n")[2]
        named.add(name := BUILTIN + path.parent.name)
        yield ListedItem(name, first_sentence(readme))
    for name, folder in sorted(state.recorded_models().items()):
        if name not in named:
            named.add(name)
            yield ListedItem(name, f"has files in {folder}")
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*")):
        name = folder.name.removeprefix("models--").replace("--", "/")
        if name not in named and next(folder.glob("snapshots/*/config.json"), None) is not None:
            yield ListedItem(name, "in the hub's cache")


def _plans() -> Iterator[ListedItem]:
    for path in state.all_plans():
        try:
            plan = Plan.load(path)
        except DocumentError as error:
            yield ListedItem(path.stem, f"faulty: {error}", (("path", str(path)),))
            continue
        bits = f"{plan.bits.nominal:.4g} nominal, {plan.bits.stored:.4g} stored bits"
        method = plan.provenance.get("method", "unknown method")
        more = (("path", str(path)), ("model", plan.model.id))
        yield ListedItem(path.stem, f"{bits}, by {method}, for {plan.model.id}", more)


def _presets() -> Iterator[ListedItem]:
    for name, path in ((name, presets()[name]) for name in presets()):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        yield ListedItem(name, first_sentence(comment))


def _registered(file: str) -> Callable[[], Iterator[ListedItem]]:
    """Return what lists the places of the first registry in a file, each by the docstring of its module or class."""

    def items() -> Iterator[ListedItem]:
        source = PACKAGE / file
        places = _places(source)
        several = [place.partition(":")[0] for place in places.values()]
        for name, place in places.items():
            module, _, attribute = place.partition(":")
            path = source.parent / f"{module.replace('.', '/')}.py"
            tree = ast.parse(path.read_text(encoding="utf-8"))
            own = _class(tree, attribute) if several.count(module) > 1 else None
            yield ListedItem(name, first_sentence(ast.get_docstring(own or tree) or ""))

    return items


def _places(source: Path) -> dict[str, str]:
    """Return the places of the first registry that a file makes with a table of them."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Registry" and len(node.args) == 4:
            return dict(ast.literal_eval(node.args[3]))
    raise AssertionError(f"{source} has no registry with a table of places")


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _tasks() -> Iterator[ListedItem]:
    """Yield the tasks of our own, and the names that stand for several."""
    from ..evaluation import SETS

    yield from _registered("evaluation/__init__.py")()
    for name, members in SETS.items():
        yield ListedItem(name, f"several at once: {', '.join(members)}")


def _solvers() -> Iterator[ListedItem]:
    from ..allocation import METHODS, solvers

    for name in METHODS:
        path = Path(solvers.__file__).with_name(f"{name}.py")
        yield ListedItem(name, first_sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""))


def _policies() -> Iterator[ListedItem]:
    """Yield scores of tokens, rules that merge, scores of key channels: named by a decorator, then the user's own."""
    cache, shipped = PACKAGE / "cache", set()
    scores = sorted((cache / "policies").glob("*.py"), key=lambda path: (path.stem == "channels", path.stem))
    for path in (*scores[:-1], *sorted((cache / "merging").glob("*.py")), scores[-1]):
        of = {"merging": "merge"}.get(path.parent.name, "channels" if path.stem == "channels" else "tokens")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and (name := _registered_name(node)) is not None:
                yield ListedItem(name, f"{of}: {first_sentence(ast.get_docstring(node) or '')}", (("of", of),))
                shipped.add(name)
    if (policies := sys.modules.get("kvmix_cli.cache.policies")) is None:  # no file of the user's has loaded it
        return
    merges = getattr(sys.modules.get("kvmix_cli.cache.merging"), "MERGES", {})
    for of, registry in (("tokens", policies.TOKEN_SCORES), ("merge", merges), ("channels", policies.CHANNEL_SCORES)):
        for name in registry:
            if name not in shipped:
                yield ListedItem(name, f"{of}: {first_sentence(registry[name].__doc__ or '')}", (("of", of),))


def _codecs() -> Iterator[ListedItem]:
    """Yield the codecs of pages: those of the registry's table, then the user's."""
    from ..codecs import CODECS

    shipped = list(_registered("codecs/__init__.py")())
    yield from shipped
    for name in CODECS:
        if name not in {item.name for item in shipped}:
            yield ListedItem(name, first_sentence(CODECS[name].__doc__ or ""))


def _registered_name(node: ast.ClassDef) -> str | None:
    """Return the name under which a decorator `REGISTRY.register("name")` puts a class; None without one."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "attr", "") == "register":
            return str(ast.literal_eval(decorator.args[0]))
    return None


_KINDS: dict[str, Callable[[], Iterator[ListedItem]]] = {
    "models": _models,
    "plans": _plans,
    "presets": _presets,
    "probes": _registered("profiling/probes/__init__.py"),
    "solvers": _solvers,
    "tasks": _tasks,
    "policies": _policies,
    "codecs": _codecs,
    "exports": _registered("export/__init__.py"),
}
"""What lists each kind."""
