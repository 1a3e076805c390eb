"""What somebody may have meant who named a file or directory that is not there."""

from __future__ import annotations

import difflib
from pathlib import Path


def near_path(path: str) -> str:
    """`did you mean X? ` where each part of the path is there or has a name like it beside it; else nothing."""
    if path.startswith("~"):
        return f"~ is the shell's: did you mean {Path(path).expanduser()}? "
    wanted = Path(path)
    found = Path(wanted.anchor or ".")
    for part in wanted.parts[1:] if wanted.anchor else wanted.parts:
        if (found / part).exists():
            found /= part
            continue
        names = [entry.name for entry in found.iterdir()] if found.is_dir() else []
        near = difflib.get_close_matches(part, names, n=1)
        if not near:
            return ""
        found /= near[0]
    return f"did you mean {found}? "
