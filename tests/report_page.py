"""A page that `ddpo-fast report` writes, taken apart for tests."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from ddpo_fast.report import page


class Page(HTMLParser):
    """A page's tags with their attributes, its text outside of scripts, and the data that its script reads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._in = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        (self.scripts if self._in == "script" else self.texts if not self._in else []).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def page_of(*folders: Path) -> Page:
    return Page(page.render(folders))
