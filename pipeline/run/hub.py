"""Finished students on the Hugging Face hub, in private repositories."""

from __future__ import annotations

from typing import Any

from duet.cache.errors import UserError
from duet.cache.files import publish_json, read_json
from duet.pipeline.config.run_dir import StudentDir
from duet.pipeline.run.terminal import say


def push(name: str, student: StudentDir, repository: str) -> None:
    """Upload `model/` to a private repository, which is made where there is none; done once."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    path = student.pushed
    if path.is_file() and read_json(path)["repository"] == repository:
        return
    http_error: Any = HfHubHTTPError.__bases__[0]  # of whichever HTTP library the hub's package uses: no answer at all
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        private = api.repo_info(repository).private  # it may have been there before
        if not private:
            raise UserError(
                f"student {name}: {repository} is public", "make it private, or name another in push_to_hub"
            )
        commit = api.upload_folder(repo_id=repository, folder_path=student.model, commit_message=f"Student {name}")
    except (OSError, ValueError, http_error) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"student {name}: pushing to {repository} failed: {lines[0]}",
            "check push_to_hub, the network and your hub token (`hf auth login`); the same command tries again, the "
            "student is kept",
        ) from error
    publish_json(path, {"repository": repository, "revision": commit.oid})
    say(f"student {name}: pushed to {repository}, revision {commit.oid[:8]}")
