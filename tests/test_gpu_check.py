"""The script for a machine with a GPU runs here, on a CPU and with tiny sizes, and writes a file for every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
from support import ROOT


def test_every_step_runs_and_writes_its_file(tmp_path):
    command = ["sh", "scripts/gpu_check.sh", "--device", "cpu", "--tiny"]
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    assert found.keys() == gpu_check.LIMITS_S.keys()
    assert done.returncode == 0, found
    skipped = {name: result["why"] for name, result in found.items() if result["state"] == "skipped"}
    assert skipped == gpu_check.NEEDS_GPU
    figures = {name: result["figures"] for name, result in found.items() if result["state"] == "done"}
    assert figures["head"]["gathered"]["seconds"] > 0
    assert figures["head"]["whole_compiled"]["why"]
    assert all(way["seconds"] > 0 for way in figures["loss"].values())
    for name in ("train_full", "train_lora"):
        assert figures[name]["steps"] == 2
        assert figures[name]["estimated_gib"] > 0
    assert figures["lab"]["student_base"]["steps"] > 0


def test_its_limits_leave_room_within_nine_minutes():
    assert sum(gpu_check.LIMITS_S.values()) <= gpu_check.ALL_S == 540


def test_a_step_that_fails_or_hangs_says_so_and_leaves_no_process(tmp_path, monkeypatch):
    program = tmp_path / "step.sh"
    program.write_text(
        f"[ $2 != head ] || {{ echo a reason >&2; exit 1; }}\nsleep 600 &\necho $! >{tmp_path}/pid\nwait\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(program))
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # which starts at once
    failed = gpu_check.run_step("head", [], tmp_path, 60)
    assert (failed["state"], failed["why"]) == ("failed", ["a reason"])
    late = gpu_check.run_step("loss", [], tmp_path, 5)
    assert late["state"] == "out of time"
    assert not _lives(int((tmp_path / "pid").read_text()))


def _lives(pid: int) -> bool:
    for _ in range(100):  # a killed process is gone as soon as its new parent has asked for it
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return False
        time.sleep(0.1)
    return True
