"""The texts of the proof on a real model: where they come from, how they are cut, and the manifest that fixes them.

prose     Debian's package debian-handbook, en-US: pages for calibration and others for the test
french    the same book, fr-FR: only translations of test pages
code      the standard library's sources, the test part of gqa.study's split by file
dialogue  chats that the parent writes itself, with another seed than the calibration's (`real_bench.py` samples them)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from gqa.errors import GqaError
from gqa.record import write_text_atomic
from gqa.study.embedded import stdlib_corpus
from gqa.text import read_text

LANGUAGES = {"prose": "en-US", "french": "fr-FR"}
KINDS = ("prose", "code", "french", "dialogue")
CALIBRATION = "prose-calibration"
MANIFEST = Path(__file__).with_name("texts.json")
_TEST_DIGITS = (2, 5, 8)  # of a page's number: 3 pages of 10 are for the test
_CONTENTS = "index.html"  # the table of contents: headings of all pages, so of both parts
_LONG_LINE = 100  # characters from which on a line that two parts share is no accident


@dataclasses.dataclass(frozen=True)
class Text:
    """A part of a text and what the manifest says of it."""

    content: str
    about: Mapping[str, Any]


def collect(handbook: Path) -> dict[str, Text]:
    """All texts by name (`prose-calibration`, `prose-test`, `code-test`, `french-test`).

    Raises GqaError for a folder without the handbook's pages and where the standard library is not there as files.
    """
    texts = {}
    for kind, language in LANGUAGES.items():
        pages = handbook_pages(handbook / language)
        parts = dict(zip(("calibration", "test"), split_pages(pages), strict=True))
        for part in ("calibration", "test") if kind == "prose" else ("test",):
            about = {"source": f"Debian package debian-handbook, html/{language}", "edition": pages.edition}
            content = "\n\n".join(pages.texts[name] for name in parts[part])
            texts[f"{kind}-{part}"] = _text(content, **about, pages=list(parts[part]))
    code = read_text(stdlib_corpus().test)
    source = f"standard library of Python {platform.python_version()}, test part of gqa.study's split by file"
    texts["code-test"] = _text(code, source=source)
    own = set(long_lines(texts[CALIBRATION].content))
    for name, text in texts.items():
        if name != CALIBRATION:
            lines = long_lines(text.content)
            shared = sum(line in own for line in lines) / max(1, len(lines))
            texts[name] = Text(text.content, {**text.about, "long_lines_shared_with_calibration": shared})
    return texts


@dataclasses.dataclass(frozen=True)
class Pages:
    """texts: by file name, in the order of their numbers; edition: as the publisher's tool wrote it into each page."""

    texts: Mapping[str, str]
    edition: str | None

    def __iter__(self):
        return iter(self.texts)


def handbook_pages(folder: Path) -> Pages:
    """The pages of one language as text, in the order of their file names, without the table of contents.

    Raises GqaError if there are too few for both parts."""
    files = [path for path in sorted(folder.glob("*.html")) if path.name != _CONTENTS]
    if len(files) <= _TEST_DIGITS[0]:
        raise GqaError(
            "the folder does not hold the handbook's pages",
            got=f"{len(files)} .html files in html/{folder.name}",
            allowed="the folder usr/share/doc/debian-handbook/html of the unpacked package",
            hint="apt-get download debian-handbook && dpkg -x debian-handbook_*.deb FOLDER",
        )
    pages = {path.name: path.read_text(encoding="utf-8") for path in files}
    editions = {match[1] for page in pages.values() if (match := re.search(r'name="package" content="([^"]+)"', page))}
    return Pages({name: page_text(page) for name, page in pages.items()}, min(editions, default=None))


def split_pages(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """File names in order -> those for calibration and those for the test: page number n is for the test where its last
    digit is 2, 5 or 8."""
    parts: tuple[list[str], list[str]] = ([], [])
    for number, name in enumerate(names):
        parts[number % 10 in _TEST_DIGITS].append(name)
    return parts


def page_text(page: str) -> str:
    """The text of an HTML page: no navigation, banner or head; a line per block, code as it stands."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    text = "".join(reader.pieces)
    return re.sub(r"[ \t]*\n(?:[ \t]*\n)+", "\n\n", text).strip()


class _Reader(HTMLParser):
    _BLOCKS = frozenset(
        ("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd", "pre", "table", "tr", "br")
    )
    _SKIPPED = frozenset(("head", "script", "style"))
    _SKIPPED_MARKS = frozenset(("docnav", "banner"))  # class or id of what every page repeats
    _SKIPPED_IDS = frozenset(("title",))
    _EMPTY = frozenset(("area", "base", "br", "col", "hr", "img", "input", "link", "meta"))  # elements without an end

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._open: list[tuple[str, bool]] = []  # (element, whether its text is left out)
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._BLOCKS:
            self.pieces.append("\n")
        if tag in self._EMPTY:
            return
        named = dict(attrs)
        marks = {*(named.get("class") or "").split(), named.get("id")}
        repeated = bool(marks & self._SKIPPED_MARKS) or named.get("id") in self._SKIPPED_IDS
        self._open.append((tag, self._hidden or tag in self._SKIPPED or repeated))
        self._verbatim += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self._EMPTY:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._BLOCKS:
            self.pieces.append("\n")
        if tag in (name for name, _ in self._open):
            while self._open.pop()[0] != tag:
                pass
            self._verbatim -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._verbatim == 0:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self.pieces and self.pieces[-1].endswith("\n") else data
        if data:
            self.pieces.append(data)

    @property
    def _hidden(self) -> bool:
        return bool(self._open) and self._open[-1][1]


def long_lines(text: str) -> list[str]:
    """Lines that are long enough to know a paragraph by."""
    return [line.strip() for line in text.splitlines() if len(line) >= _LONG_LINE]


def check_manifest(texts: Mapping[str, Text], path: Path) -> None:
    """Compare with the manifest at `path`, or write it where there is none yet.

    Raises GqaError where a text is another than the manifest says, so that two records of one manifest are of the same
    texts."""
    found = {name: dict(text.about) for name, text in texts.items()}
    if not path.exists():
        write_text_atomic(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return
    wanted = json.loads(path.read_text(encoding="utf-8"))
    names = wanted.keys() | found.keys()
    different = sorted(
        name for name in names if wanted.get(name, {}).get("sha256") != found.get(name, {}).get("sha256")
    )
    if different:
        sources = "; ".join(str(wanted[name]["source"]) for name in different if name in wanted)
        raise GqaError(
            "the texts are not those of the manifest",
            got=f"another {', '.join(different)}",
            allowed=sources or None,
            hint="--manifest NEW.json measures on the texts at hand and writes their manifest",
        )


def sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _text(content: str, **about: Any) -> Text:
    return Text(content, {**about, "characters": len(content), "sha256": sha256(content)})
