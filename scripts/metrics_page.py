"""`make docs-metrics`: writes docs/metrics.md from what the code's docstrings say of each metric. Run after changing one."""

from __future__ import annotations

from pathlib import Path

from duet.cache.files import publishing
from duet.pipeline.run.terminal import say
from duet.stages.evaluate.definitions import all_metrics, as_markdown

PAGE_PATH = Path(__file__).parent.parent / "docs" / "metrics.md"


def write_page() -> None:
    """Write the page anew."""
    with publishing(PAGE_PATH) as temporary:
        temporary.write_text(as_markdown(all_metrics()), encoding="utf-8")
    say(f"written: docs/{PAGE_PATH.name}")


if __name__ == "__main__":
    write_page()
