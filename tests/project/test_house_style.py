"""House style that no linter checks: sizes, words and names."""

import ast
import functools
import itertools
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in (ROOT / "kvmix_cli", ROOT / "kernels" / "kvmix_kernels")
    for path in sorted(folder.rglob("*.py"))
    if "assets" not in path.parts
]
LARGEST = 400
"""Lines of a file; a larger one is more than one idea."""
OPENERS = re.compile(r"(Whether|What|Of|Who|Whose|Where|Which|How|That|By|With|For|If|As)\b")
"""Words that open a docstring which describes instead of saying what is done."""
TERMS = ROOT / "docs" / "terms.md"
CASES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in SOURCES]


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def classes():
    """Yield the name and place of every class."""
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                yield node.name, f"{path.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.parametrize("path", CASES)
def test_files_are_one_idea_long(path):
    assert len(path.read_text().splitlines()) <= LARGEST


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES)
def test_docstrings_say_what_is_done(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    documented = [node for node in ast.walk(tree_of(path)) if isinstance(node, kinds)]
    wrong = [f"{node.name}: {doc}" for node in documented if OPENERS.match(doc := ast.get_docstring(node) or "")]
    assert not wrong


def test_no_class_name_is_used_twice():
    places = defaultdict(list)
    for name, place in classes():
        if not name.startswith("_"):
            places[name].append(place)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_every_noun_of_an_exported_class_is_a_term():
    """The last word of a public class name that a package exports is explained in docs/terms.md, once."""
    terms = re.findall(r"^\| \*\*([\w -]+)\*\*", TERMS.read_text(), re.MULTILINE)
    assert len(terms) == len(set(terms))
    known = {word for term in terms for word in term.lower().split()}
    nouns = {}
    for path in SOURCES:
        if path.name != "__init__.py":
            continue
        for name in exported(tree_of(path)):
            if name[:1].isupper() and not name.isupper():
                nouns[name] = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+", name)[-1].lower()
    assert not {name: noun for name, noun in nouns.items() if noun not in known}


def test_structures_names_files_that_are_there_and_no_command_passes_more_than_eight():
    text = (ROOT / "docs" / "structures.md").read_text()
    paths = re.findall(r"`([a-z_/]+\.py|kernels/[a-z_/.]+)`", text)
    folders = (ROOT, ROOT / "kvmix_cli", ROOT / "kvmix_cli/cache/packing", ROOT / "kernels/kvmix_kernels/attend")
    assert not [path for path in paths if not any((folder / path).exists() for folder in folders)]
    lists = re.split(r"^`kvmix ", text, flags=re.MULTILINE)[1:]
    lengths = [len(re.findall(r"^\d+\. ", part, re.MULTILINE)) for part in lists]
    assert len(lengths) == 4
    assert max(lengths) <= 8


def exported(tree):
    """Return the names in a module's `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_the_tree_in_the_readme_is_the_tree():
    """Every line of the README's tree names something that is there, and every room is in it."""
    block = re.search(r"## Where things are\n\n((?:    .*\n|\n)+)", (ROOT / "README.md").read_text())
    assert block is not None
    named, folders = set(), []
    for line in filter(str.strip, block[1].splitlines()):
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        parts = re.split(r"\s{2,}", line.strip())
        for entry in parts[:-1] or parts:
            path = Path(*folders[:depth], entry)
            assert (ROOT / path).exists(), f"{path} is not there"
            named.add(str(path))
            if entry.endswith("/"):
                folders[depth:] = [entry]
    rooms = {f"kvmix_cli/{path.name}" for path in (ROOT / "kvmix_cli").iterdir() if path.is_dir()}
    assert not {room for room in rooms if "__pycache__" not in room} - named


def test_numbers_that_may_be_one_have_a_singular():
    nouns = re.compile(r" (more |new |packed |exact )*(samples|documents|exercises|processors|repeats|predictions)\b")
    found = [
        f"{path.name}:{text.lineno}: {ast.unparse(number.value)}{words.value[:20]}"
        for path in SOURCES
        for text in ast.walk(tree_of(path))
        if isinstance(text, ast.JoinedStr)
        for number, words in itertools.pairwise(text.values)
        if isinstance(number, ast.FormattedValue) and isinstance(words, ast.Constant) and nouns.match(words.value)
        if ast.unparse(number.value) != "name" and not ast.unparse(number.value).isupper()
    ]
    assert not found, "say it with `counted`"
