"""Local copies of data sets of the Hugging Face hub: `data_dir` names their folder, and takes the place of hf:// in a config.

Configs that come with Duet name data sets on the hub, which everybody has. What is read stands in the resolved config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.stages.questions.columns import HUB_SCHEME
from duet.stages.questions.queries import READERS

KEY = "data_dir"
ENDINGS = (*READERS, "-00000-of-00001.parquet")  # the last is the hub's own way to name a split of one file


def with_local_copies(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings with the files of `data_dir` in the place of data sets on the hub; as they are where it is not set.

    UserError where a copy is missing or there are two, and where no data set is one of the hub.
    """
    folder = raw.get(KEY)
    if not isinstance(folder, str):
        return raw
    found = _local({key: value for key, value in raw.items() if key != KEY}, Path(folder))
    if found == {key: value for key, value in raw.items() if key != KEY}:
        raise UserError(f"{KEY}: {folder}: the config names no data set of the hub, so it does nothing", "leave it out")
    return found


def _local(node: Any, folder: Path) -> Any:
    if isinstance(node, list | tuple):
        return [_local(entry, folder) for entry in node]
    if not isinstance(node, dict):
        return node
    path = node.get("path")
    if isinstance(path, str) and path.startswith(HUB_SCHEME):
        copy = _copy_of(path, node.get("name"), node.get("split", "train"), folder)
        node = {key: value for key, value in node.items() if key not in ("name", "split")} | {"path": str(copy)}
    return {key: _local(value, folder) for key, value in node.items()}


def _copy_of(path: str, name: str | None, split: str, folder: Path) -> Path:
    """FOLDER/NAME/SPLIT, or FOLDER/NAME where the split is train; FOLDER/SPLIT of a data set without names."""
    stems = [split] if name is None else [f"{name}/{split}", *([name] if split == "train" else [])]
    there = [file for stem in stems for ending in ENDINGS if (file := folder / f"{stem}{ending}").is_file()]
    if len(there) == 1:
        return there[0]
    wanted = " or ".join(f"{folder / stem}.jsonl" for stem in stems)
    what = f"{path} (name {name}, split {split})"
    if there:
        raise UserError(f"{KEY}: {what} has several copies: {', '.join(map(str, there))}", "leave one of them there")
    raise UserError(
        f"{KEY}: {folder} has no copy of {what}", f"expected {wanted}, or another kind of file of that name"
    )
