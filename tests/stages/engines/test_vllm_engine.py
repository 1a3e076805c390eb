"""Real vLLM: both ways in which logits come out of it, every kind of request, and what it does when a worker dies."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import LAB_BASE, ROOT, read_all, run_duet, two_sets

from duet.cache.errors import EXIT_DONE, EXIT_INTERRUPTED
from duet.stages.engines.interface import Ask, EngineSpec, Request
from duet.stages.engines.transformers_engine import TransformersEngine
from duet.stages.models.tokenizers import load_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(),
    reason="needs vLLM's build for the CPU: `make setup` says why it is not there",
)
TOP_K = 9
PREFIX_TOKENS, CONTEXT = 300, 512


def asked() -> dict[str, tuple[list[Request], Ask]]:
    """Twelve prompts that begin alike with 300 tokens, with one and with none, and each way to come by a response."""
    draw = np.random.default_rng(0)
    prefix = draw.integers(5, 900, PREFIX_TOKENS).tolist()
    prompts = [[*prefix, *draw.integers(5, 900, 3 + n).tolist()] for n in range(12)]
    greedy = [Request(n, ids) for n, ids in enumerate(prompts)]
    given = [replace(r, given_ids=draw.integers(5, 900, 1 + r.key % 4).tolist()) for r in greedy]
    sampled = [replace(r, seed=r.key) for r in greedy]
    ask = Ask(TOP_K, 4, logsumexp=True)
    return {
        "greedy": (greedy, ask),
        "prefix of one": ([replace(r, prompt_ids=[5, *r.prompt_ids[PREFIX_TOKENS:]]) for r in greedy], ask),
        "no prefix": ([replace(r, prompt_ids=r.prompt_ids[PREFIX_TOKENS:]) for r in greedy], ask),
        "given": (given, ask),
        "sampled": (sampled, replace(ask, temperature=2.0)),
        "sampled again": (sampled[::-1], replace(ask, temperature=2.0)),
    }


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """The lab's base model with room for the prefix: its positions are rotary and go on."""
    folder = tmp_path_factory.mktemp("model") / "base"
    shutil.copytree(LAB_BASE, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory, model_dir) -> dict:
    folder = tmp_path_factory.mktemp("vllm")
    by_rows = asked()
    by_lists = {name: (requests, replace(ask, logsumexp=False)) for name, (requests, ask) in asked().items()}
    (folder / "asked.pickle").write_bytes(pickle.dumps({"rows": by_rows, "lists": by_lists}))
    command = [sys.executable, str(ROOT / "tests/helpers/vllm_routes.py"), str(model_dir), str(folder), str(CONTEXT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "helpers")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return pickle.loads((folder / "found.pickle").read_bytes())


@pytest.fixture(scope="module")
def reference(model_dir) -> TransformersEngine:
    tokenizer = load_tokenizer(model_dir)
    return TransformersEngine(
        EngineSpec(model_dir, "float32", len(tokenizer), CONTEXT, (tokenizer.eos_token_id,), "cpu", share_prefix=False)
    )


@pytest.mark.parametrize("route", ["rows", "lists"])
@pytest.mark.parametrize("kind", ["greedy", "prefix of one", "no prefix", "given", "sampled"])
def test_every_response_has_the_logits_of_the_reference(found, reference, route, kind):
    """What vLLM said, scored by the other engine without any sharing of prefixes."""
    requests, ask = asked()[kind]
    results, _ = found[route][0][kind]
    responses = [replace(r, given_ids=s.response_ids.tolist()) for r, s in zip(requests, results, strict=True)]
    expected = reference.score_all(responses, replace(ask, temperature=None))
    for request, a, b in zip(requests, results, expected, strict=True):
        assert request.given_ids is None or a.response_ids.tolist() == list(request.given_ids)
        assert np.array_equal(a.topk_ids_PK, b.topk_ids_PK)
        assert np.abs(a.topk_logits_PK - b.topk_logits_PK).max() < 1e-3
        if route == "rows":
            assert np.abs(a.logsumexp_P - b.logsumexp_P).max() < 1e-3
        else:
            assert a.logsumexp_P is None
    if kind == "greedy":
        greedy = reference.score_all(requests, ask)
        assert [s.response_ids.tolist() for s in results] == [s.response_ids.tolist() for s in greedy]


def test_sampled_responses_depend_on_their_seeds_alone(found):
    results, again = (found["rows"][0][kind][0] for kind in ("sampled", "sampled again"))
    assert [s.response_ids.tolist() for s in results] == [s.response_ids.tolist() for s in again[::-1]]
    assert len({tuple(s.response_ids) for s in results}) > 6


def test_both_engines_draw_the_same_responses(found, reference):
    requests, ask = asked()["sampled"]
    expected = reference.score_all(requests, ask)
    results = found["rows"][0]["sampled"][0]
    assert [s.response_ids.tolist() for s in results] == [s.response_ids.tolist() for s in expected]


def test_greedy_continuations_are_those_of_the_reference(found, reference):
    prompts = [list(request.prompt_ids) for request in asked()["greedy"][0]]
    for route in ("rows", "lists"):
        assert found[route][1] == reference.generate(prompts, 6)


def test_ids_that_others_name_are_not_to_be_had_of_vllm(found):
    """Else docs/teacher.md is wrong, and `teacher.ids: given` could run on it."""
    for route in ("rows", "lists"):
        assert "prompt_logprob_token_ids requires the V2 model runner" in found[route][2]


def test_what_prompts_begin_with_is_computed_once(found):
    """vLLM's own count: whole blocks of 32 tokens of the 300 that all begin with."""
    requests, _ = asked()["greedy"]
    for route in ("rows", "lists"):
        usage = found[route][0]["greedy"][1]
        assert usage.prompt_tokens == sum(len(request.prompt_ids) for request in requests)
        assert usage.cached_tokens >= 288 * len(requests)


def test_a_killed_worker_of_vllm_is_an_interruption_and_costs_the_shards_in_flight(lab_config, tmp_path):
    """Two worker processes, one killed when shards are written; the next call, with one process, writes the rest."""
    rows = [{"question": f"Where was the person with the number {n} born?"} for n in range(3000)]
    settings = {
        "data": two_sets(tmp_path, rows),
        "store__shard_rows": 100,
        "teacher__engine": "vllm",
        "teacher__max_positions": 8,
    }
    config = str(lab_config(**settings))
    command = [sys.executable, "-m", "duet", "teacher-logits", "--config", config]
    command += ["--set", "teacher.tensor_parallel=2"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not list(tmp_path.glob("runs/lab/teacher/*/shard-00001.json")):
        os.sched_yield()
    os.kill(worker_of(run.pid), signal.SIGKILL)
    _, err = run.communicate()
    assert run.returncode == EXIT_INTERRUPTED, err
    assert "was killed by SIGKILL; what was complete is kept" in err
    assert "hint: run the same command again" in err
    assert "a bug in Duet" not in err  # of the other worker's last words vLLM decides
    [store] = (path.parent for path in tmp_path.glob("runs/lab/teacher/*/plan.json"))
    written = {path: path.stat().st_mtime_ns for path in store.glob("shard-*.arrow")}
    assert 1 < len(written) < 60
    done = run_duet("teacher-logits", "--config", config)
    assert done.returncode == EXIT_DONE, done.stderr
    assert f"wrote {6000 - 100 * len(written)} rows" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(read_all(store)) == 6000


def worker_of(pid: int) -> int:
    """The last of vLLM's worker processes among the children of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    workers = [int(child) for child in children if "Worker" in Path(f"/proc/{child}/cmdline").read_text()]
    assert workers, "vLLM must have started workers"
    return workers[-1]
