"""The site of docs/, as `make docs` builds it: no warning, no broken link, no other host, the first page in order."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import kvmix_cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


class Markup(HTMLParser):
    """What a page has: ids, links, and what a browser fetches when it shows the page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.fetched = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids.add(found.get("id"))
        if tag == "a":
            self.links.append(found.get("href") or "")
        elif tag in ("script", "img", "link", "iframe"):
            self.fetched.append(found.get("src") or found.get("href") or "")


def is_outside(address):
    return bool(urlsplit(address).scheme or urlsplit(address).netloc)


def table_below(page, heading):
    """The cells of the first table below a heading, without marks."""
    title = re.compile("#+ " + heading.replace("-", r"\W+") + "\n", re.IGNORECASE)
    rows = re.search(r"(?:^\|.*\n)+", title.split((DOCS / page).read_text())[1], re.MULTILINE)[0].splitlines()
    return [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in rows if not row.startswith("|---")]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_is_whole(tmp_path):
    """One test, as the build is what takes time; without --quiet, which hides warnings even from --strict."""
    for package in ("material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "WARNING" not in done.stderr + done.stdout

    pages = {path: Markup(path.read_text()) for path in tmp_path.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        assert not [address for address in page.fetched if is_outside(address)], path
        for link in filter(lambda link: not is_outside(link), page.links):
            target = (path.parent / unquote(urlsplit(link).path)).resolve() if urlsplit(link).path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path} leads to {link}"
            if (heading := urlsplit(link).fragment) and target in pages:
                assert unquote(heading) in pages[target].ids, f"{path} leads to {link}"

    assert [name for name in kvmix_cli.__all__ if f"kvmix_cli.{name}" in every_id(pages)] == [
        name for name in kvmix_cli.__all__ if name != "__version__"
    ]
    assert "kernels.html" in pages[tmp_path / "benchmarks.html"].links
    assert "source/kernels/bench/results.csv.html" in pages[tmp_path / "benchmarks.html"].links

    front = (tmp_path / "index.html").read_text()
    assert re.findall(r'<h2 id="([\w-]+)"', front)[:2] == ["what-to-type", "leaderboard"]
    shown = re.sub(r"<[^>]+>", " ", front)
    source = (DOCS / "index.md").read_text().partition("## Leaderboard")[2]
    assert re.findall("builtin:tiny|SmolLM2", source)[:2] == ["builtin:tiny", "SmolLM2"]
    boards = re.findall(r"^<!-- table: (\S+)#(\S+) -->$", source, re.MULTILINE)
    assert len(boards) == 2
    for page, heading in boards:
        cells = [re.split(r"\W*\[", cell)[0] for row in table_below(page, heading) for cell in row]
        assert len(cells) > 8
        assert not [cell for cell in cells if cell not in shown]


def every_id(pages):
    return set().union(*(page.ids for page in pages.values()))
