"""A forked child process is what one with an interpreter of its own is: streams, codes, place, signals, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT
from warm import PROGRAM

REAL = (sys.executable, "-m", "duet")
SAYS_ITS_PID = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
TOLD = "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); "


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["distill"], ["nothing"], ["cache", "ls", "/none"]])
def test_commands_end_as_in_an_interpreter_of_their_own(arguments):
    forked, real = (
        subprocess.run([*program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        for program in (PROGRAM, REAL)
    )
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
    assert forked.stderr == real.stderr


def test_it_has_the_callers_directory_environment_cores_and_standard_input(tmp_path):
    code = "import os, sys; print(os.getcwd(), sorted(os.environ), os.sched_getaffinity(0), sys.argv, sys.stdin.read())"
    core = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(core), *PROGRAM, "-c", code, "x"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        input="given",
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in ("LC_CTYPE", "PATH") if name in done.stdout]  # a shell's start may add the first
    assert done.stdout == f"{tmp_path} {names} {{{core}}} ['-c', 'x'] given\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(75)", 75), ("1 / 0", 1), ("raise SystemExit('word')", 1), ("pass", 0),
     ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL)],
)  # fmt: skip
def test_codes(code, expected):
    assert subprocess.run([*PROGRAM, "-c", code], capture_output=True, check=False).returncode == expected


def test_a_signal_reaches_it():
    code = f"{TOLD}print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([*PROGRAM, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    child.terminate()
    child.communicate()
    assert child.returncode == 75


def test_it_dies_with_its_caller():
    child = subprocess.Popen([*PROGRAM, "-c", SAYS_ITS_PID], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    process = Path("/proc") / child.stdout.readline().strip()
    assert process.is_dir()
    child.kill()
    child.wait()
    deadline = time.monotonic() + 30
    while process.is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.02)
