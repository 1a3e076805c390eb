"""Benchmarks run, and make every claim that they have a bound for. Sizes are exact and are asserted; rates are not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import evaluate as bench_evaluate
import evaluate_bounds as bench_evaluate_bounds
import exchange as bench_exchange
import pytest
import store as bench_store
import student as bench_student
import teacher as bench_teacher
import teacher_engine as bench_teacher_engine
from support import ROOT, SHARED


def claims_of(script: str, bounds: dict, *options: str) -> dict[str, float]:
    """Run a benchmark on little data; its claims, which are those that it has bounds for."""
    command = [sys.executable, f"benchmarks/{script}", "--quick", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() == {"machine", "claims", "details"}
    assert report["claims"].keys() == bounds.keys()
    rates = {name: value for name, value in report["claims"].items() if "rss" not in name}  # growth of little is noise
    assert all(value >= 0 for value in rates.values())
    return report["claims"]


def test_the_stores_benchmark_makes_its_claims(tmp_path):
    claims = claims_of("store.py", bench_store.BOUNDS, "--folder", str(tmp_path))
    for name, (_, bound) in bench_store.BOUNDS.items():
        if "bytes" in name:
            assert claims[name] <= bound, name
    assert not list(tmp_path.iterdir())


def test_the_benchmark_of_exchange_makes_its_claims(tmp_path):
    claims_of("exchange.py", bench_exchange.BOUNDS, "--folder", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_students_benchmark_makes_its_claims():
    claims_of("student.py", bench_student.BOUNDS)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_the_evaluations_benchmark_makes_its_claims():
    claims_of("evaluate.py", bench_evaluate.BOUNDS)


def test_the_benchmark_of_what_is_left_to_save_in_stage_three_makes_its_claims():
    claims_of("evaluate_bounds.py", bench_evaluate_bounds.BOUNDS, "--part", "lab")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_the_benchmark_of_stage_ones_engine_makes_its_claims():
    claims = claims_of("teacher_engine.py", bench_teacher_engine.BOUNDS)
    assert claims["capture.logits_vs_before"] <= bench_teacher_engine.BOUNDS["capture.logits_vs_before"][1]


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or not SHARED.is_dir(),
    reason="needs vLLM (`make setup` says why it is not there) and ../shared",
)
def test_the_teachers_benchmark_makes_its_claims():
    claims_of("teacher.py", bench_teacher.BOUNDS)
