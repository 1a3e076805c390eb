"""Link the packages under the name that they are imported by, in build/names, for tools that do not read package-dir."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Write build/names/duet; pyright, mkdocstrings and scripts/gpu_check.sh read it."""
    folder = ROOT / "build" / "names" / "duet"
    folder.mkdir(parents=True, exist_ok=True)
    for target in ("api/__init__.py", "api/__main__.py", "cache", "pipeline", "stages"):
        link = folder / Path(target).name
        if not (link.is_symlink() and link.readlink() == ROOT / target):  # others may be reading it
            link.unlink(missing_ok=True)
            link.symlink_to(ROOT / target)


if __name__ == "__main__":
    main()
