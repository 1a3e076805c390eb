"""Benchmarks run, and make every claim that they have a bound for. Sizes are exact and are asserted; rates are not."""

from __future__ import annotations

import json
import subprocess
import sys

import store as bench_store
import student as bench_student
from conftest import ROOT


def test_the_stores_benchmark_makes_its_claims(tmp_path):
    command = [sys.executable, "benchmarks/store.py", "--quick", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() == {"machine", "claims", "details"}
    assert report["claims"].keys() == bench_store.BOUNDS.keys()
    assert all(value >= 0 for value in report["claims"].values())
    for name, (_, bound) in bench_store.BOUNDS.items():
        if "bytes" in name:
            assert report["claims"][name] <= bound, name
    assert not list(tmp_path.iterdir())


def test_the_students_benchmark_makes_its_claims():
    command = [sys.executable, "benchmarks/student.py", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() == {"machine", "claims", "details"}
    assert report["claims"].keys() == bench_student.BOUNDS.keys()
    assert all(value >= 0 for value in report["claims"].values())
