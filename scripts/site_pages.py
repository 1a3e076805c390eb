"""MkDocs hook: pages that lie outside docs/ join the site, and links to files that do not become their names.

Documents are written for the repository: README.md links to docs/attacks.md, and that to ../stages/attacks/attacks.yaml. On the
site the first is a page beside the second. The third is not a page: it becomes `stages/attacks/attacks.yaml`, or, where
pyproject.toml names a Repository under [project.urls], a link into that. A link to nothing is left as it is, for MkDocs to
complain about.
"""

from __future__ import annotations

import os
import re
import runpy
import tomllib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "lab/README.md": "lab.md",
    "lab/smollm2/README.md": "lab-smollm2.md",
}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


def on_startup(**_: Any) -> None:
    """Let mkdocstrings find the packages under their import name."""
    runpy.run_path(str(ROOT / "scripts" / "link_names.py"), run_name="__main__")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside docs/."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links as the site has them."""
    return rewritten(markdown, page.file.src_uri, repository_of(ROOT / "pyproject.toml"))


def repository_of(pyproject: Path) -> str | None:
    """The repository's address, where the project names one."""
    urls = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
    return urls.get("Repository")


def rewritten(markdown: str, page: str, repository: str | None) -> str:
    """A page's text with its links, which are right in the repository, made right on the site. Code blocks stay as they are."""
    source = next((path for path, made in PAGES.items() if made == page), f"docs/{page}")
    parts = FENCE.split(markdown)
    return "".join(
        part if number % 2 else LINK.sub(_linker(source, page, repository), part) for number, part in enumerate(parts)
    )


def _linker(source: str, page: str, repository: str | None) -> Callable[[re.Match[str]], str]:
    """What a link on the page `page`, which is written in the file `source`, becomes."""

    def link(found: re.Match[str]) -> str:
        text, (target, mark, anchor) = found[1], found[2].partition("#")
        if "://" in target or not target:
            return found[0]
        path = os.path.normpath(PurePosixPath(source).parent / target)
        on_site = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path)
        if on_site:
            return f"[{text}]({os.path.relpath(on_site, PurePosixPath(page).parent)}{mark}{anchor})"
        if path.startswith("..") or not (ROOT / path).exists():
            return found[0]
        if repository:
            return f"[{text}]({repository}/blob/HEAD/{path}{mark}{anchor})"
        return f"`{path}`" if text.strip("`") in (path, PurePosixPath(path).name) else f"{text} (`{path}`)"

    return link
