"""The site: it builds without a warning, it finds what is wrong, and it fetches nothing from elsewhere when it is opened."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

SCRIPT = ROOT / "scripts" / "site_pages.py"
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs the extra `docs`: run `make setup`"
)


@pytest.fixture(scope="module")
def site_pages():
    spec = importlib.util.spec_from_file_location("site_pages", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@needs_mkdocs
def test_the_site_builds_strictly_and_every_document_is_a_page(site, site_pages):
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    for page in (*pages, *site_pages.PAGES.values()):
        assert (site / page).with_suffix(".html").is_file(), page
    home = (site / "index.html").read_text(encoding="utf-8")
    attacks = (site / "attacks.html").read_text(encoding="utf-8")
    assert 'href="concepts.html"' in home
    assert "<code>stages/attacks/attacks.yaml</code>" in attacks, "a link to a source file is its name"


@needs_mkdocs
def test_an_opened_page_fetches_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (path.name, tag)
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path.name


@needs_mkdocs
def test_a_link_to_nothing_an_anchor_that_is_missing_and_a_page_in_no_menu_stop_the_build(tmp_path):
    for name in ("docs", "scripts", "api", "cache", "pipeline", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in (
        "mkdocs.yml",
        "pyproject.toml",
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "lab/README.md",
        "lab/smollm2/README.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs/lost.md").write_text("# Lost\n\n[a](nowhere.md) [b](teacher.md#nothing) [c](../stages/none.py)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for fault in ("lost.md", "'nowhere.md'", "'teacher.md#nothing'", "'../stages/none.py'"):
        assert fault in done.stderr, fault


def test_links_become_those_of_the_site(site_pages):
    def made(text: str, page: str, repository: str | None = None) -> str:
        return site_pages.rewritten(text, page, repository)

    assert made("[a](docs/teacher.md#engines)", "index.md") == "[a](teacher.md#engines)"
    assert made("[a](../README.md#the-code)", "teacher.md") == "[a](index.md#the-code)"
    assert made("[a](../../lab/README.md)", "guides/extend.md") == "[a](../lab.md)"
    assert made("[a](../concepts.md#alignment)", "guides/extend.md") == "[a](../concepts.md#alignment)"
    assert (
        made("[stages/questions/queries.py](../stages/questions/queries.py)", "teacher.md")
        == "`stages/questions/queries.py`"
    )
    assert (
        made("[the texts](../stages/attacks/attacks.yaml)", "teacher.md") == "the texts (`stages/attacks/attacks.yaml`)"
    )
    assert made("[x](../stages/questions/queries.py)", "teacher.md", "https://host/us/duet") == (
        "[x](https://host/us/duet/blob/HEAD/stages/questions/queries.py)"
    )
    for untouched in (
        "[a](https://arxiv.org/abs/1)",
        "[a](#here)",
        "[a](../none.py)",
        "```\n[a](../stages/questions/queries.py)\n```\n",
    ):
        assert made(untouched, "teacher.md") == untouched


def test_the_repository_is_what_pyproject_names(site_pages, tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "x"\n')
    assert site_pages.repository_of(project) is None
    project.write_text('[project.urls]\nRepository = "https://host/us/duet"\n')
    assert site_pages.repository_of(project) == "https://host/us/duet"
