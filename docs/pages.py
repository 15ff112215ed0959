"""Hooks of mkdocs, which make the pages of the site that are no Markdown file in docs/.

- README of the kernels, CONTRIBUTING and CHANGELOG stay where readers of the repository look for them.
- The notebook and each file of the repository that a page links to become pages that show them.
- Links between all of these are paths in the repository, and become links to pages.
- `<!-- table: PAGE.md#heading -->` becomes the first table below a heading of another page.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
NOTEBOOK = "docs/quickstart.ipynb"
PAGES = {
    "kernels/README.md": "kernels.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    NOTEBOOK: "quickstart.md",
}
"""Pages of files that are no Markdown in docs/, by the files' paths."""
LINK = re.compile(r"(?<!!)\[([^][]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
"""A link to a file: its text, the path, and the heading."""
TABLE = re.compile(r"^<!-- table: (\S+)#(\S+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no Markdown file in docs/."""
    for path, uri in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=_notebook(text) if path == NOTEBOOK else text))
    for path in sorted({path for file in files.documentation_pages() for path in _linked_sources(file)}):
        text = _fenced((ROOT / path).read_text(encoding="utf-8"), _language(path))
        listing = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n{text}"
        files.append(File.generated(config, _source_uri(path), content=listing, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put tables of other pages in their places, and turn links to files into links to their pages."""
    if page.file.inclusion is InclusionLevel.NOT_IN_NAV:
        return markdown
    folder, here = posixpath.dirname(_origin(page.file.src_uri)), posixpath.dirname(page.file.src_uri)

    def lead(link: re.Match[str]) -> str:
        text, target, heading = link[1], posixpath.normpath(posixpath.join(folder, link[2])), link[3] or ""
        if (ROOT / target).is_dir():
            return text  # a site has no folders to look into
        uri = _uri(target)
        return link[0] if uri is None else f"[{text}]({posixpath.relpath(uri, here or '.')}{heading})"

    return LINK.sub(lead, TABLE.sub(lambda place: _table(files, *place.groups()), markdown))


def _origin(uri: str) -> str:
    """Return the path in the repository of what a page shows."""
    return next((path for path, page in PAGES.items() if page == uri), f"docs/{uri}")


def _uri(path: str) -> str | None:
    """Return the page of a file of the repository; None if there is no such file."""
    if path in PAGES:
        return PAGES[path]
    if path == "README.md":
        return "index.md"  # what a reader sees first
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return _source_uri(path) if (ROOT / path).is_file() else None


def _source_uri(path: str) -> str:
    return f"source/{path}.md"


def _linked_sources(file: File) -> Iterator[str]:
    """Yield the files outside docs/ that a page links to and that no other page shows."""
    folder = posixpath.dirname(_origin(file.src_uri))
    for link in LINK.finditer(file.content_string):
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        if _uri(path) == _source_uri(path):
            yield path


def _table(files: Files, name: str, heading: str) -> str:
    """Return the first table below a heading of a page. Raises PluginError if there is none."""
    page = files.get_file_from_path(name)
    parts = re.split(r"^#+ (.+)$", "" if page is None else page.content_string, flags=re.MULTILINE)
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        table = re.search(r"(?:^\|.*\n?)+", text, re.MULTILINE)
        if slugify(title, "-") == heading and table is not None:
            return table[0]
    raise PluginError(f"there is no table below #{heading} in {name}")


def _notebook(text: str) -> str:
    """Return a notebook as Markdown: its text, its code, and what of the output is stored."""
    shown = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        shown.append(_fenced(source, "python") if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", ()):
            shown.append(_fenced("".join(output.get("text") or output["data"]["text/plain"]), "text"))
    shown.append(f'<a href="{Path(NOTEBOOK).name}" download>This page as a notebook</a>')
    return "\n\n".join(shown)


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"


def _language(path: str) -> str:
    return {".py": "python", ".sh": "sh", ".md": "markdown", ".yaml": "yaml"}.get(Path(path).suffix, "text")
