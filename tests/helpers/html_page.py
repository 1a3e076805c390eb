"""A page as tests read it: strictly, without a browser."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


class Page(HTMLParser):
    """Tags, attributes, marked values and loose text of a page; fails on a tag that is closed out of order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.marked: list[tuple[str, str, str]] = []  # pointer, form, text
        self.loose: list[tuple[str, str]] = []  # innermost tag, text
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        found = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self.open.append((tag, found))
        if "data-key" in found:
            self.marked.append((found["data-key"], found.get("data-as", ""), ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any("data-key" in found for _, found in self.open):
            key, form, text = self.marked[-1]
            self.marked[-1] = (key, form, text + data)
        elif self.open:
            tag, found = self.open[-1]
            self.loose.append((found.get("class", tag) if tag == "text" else tag, data))
