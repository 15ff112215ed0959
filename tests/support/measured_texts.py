"""Prose and code to calibrate a real model on and to measure it on, as folders of text files for `kvmix`.

    python tests/support/measured_texts.py texts

    texts/prose/{calibration,held-out}   pages of the Debian handbook, every other one each
    texts/code/{calibration,held-out}    library modules, split as the built-in text is
    texts/mixed                          as many beginnings of calibration pages as of calibration modules
    texts/book.txt                       all held-out pages, one after the other, for long contexts

The handbook is Debian's package `debian-handbook` (`apt-get install debian-handbook`). It is read where it lies, and
nothing of it belongs to this repository.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

from kvmix_cli.texts import CALIBRATION_MODULES, HELD_OUT_MODULES, module_sources

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
BEGINNING = 6000
"""Characters of a document in the mixture: about one sample of each, so that pages and modules count alike."""
MIN_CHARACTERS = 1000
"""Shorter pages are little but a title."""
VOID = {"br", "col", "hr", "img", "input", "link", "meta"}
LINES = {"br", "dd", "div", "dt", "h1", "h2", "h3", "h4", "h5", "li", "p", "pre", "td", "tr"}
"""Elements that begin a line."""


class PageText(HTMLParser):
    """The words of a page: no head, no navigation, line ends where its elements and its listings have them."""

    def __init__(self):
        super().__init__()
        self.parts = []
        self.open = []  # for each open element: is it shown, is it a listing

    def handle_starttag(self, tag, attrs):
        of = dict(attrs)
        passed = tag in ("head", "script") or of.get("id") in ("banner", "title") or "docnav" in (of.get("class") or "")
        shown, listing = self.open[-1] if self.open else (True, False)
        if tag in LINES:
            self.parts.append("\n")
        if tag not in VOID:
            self.open.append((shown and not passed, listing or tag == "pre"))

    def handle_startendtag(self, tag, attrs):
        if tag in LINES:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if tag not in VOID:
            self.open.pop()
        if tag in LINES:
            self.parts.append("\n")

    def handle_data(self, data):
        shown, listing = self.open[-1] if self.open else (True, False)
        if shown:
            self.parts.append(data if listing else re.sub(r"\s+", " ", data))


def page_text(html):
    """The text of a page, paragraphs apart."""
    page = PageText()
    page.feed(html)
    lines = [line.rstrip() if line.startswith(" " * 2) else line.strip() for line in "".join(page.parts).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def handbook_pages(folder=HANDBOOK):
    """The handbook's pages in the order of their names."""
    pages = [page_text(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.html"))]
    if not pages:
        sys.exit(f"no handbook in {folder}: apt-get install debian-handbook")
    return [page for page in pages if len(page) >= MIN_CHARACTERS]


def write(folder, texts):
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")


def modules(names):
    return [text for name in sorted(names) for text in module_sources(name)]


def main(folder):
    pages, code = handbook_pages(), modules(CALIBRATION_MODULES)
    write(folder / "prose" / "calibration", pages[0::2])
    write(folder / "prose" / "held-out", pages[1::2])
    write(folder / "code" / "calibration", code)
    write(folder / "code" / "held-out", modules(HELD_OUT_MODULES))
    (folder / "book.txt").write_text("\n".join(pages[1::2]), encoding="utf-8")
    sides = [[text[:BEGINNING] for text in side if len(text) >= BEGINNING] for side in (pages[0::2], code)]
    write(folder / "mixed", [text for pair in zip(*sides, strict=False) for text in pair])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
