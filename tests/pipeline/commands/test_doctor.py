"""`duet doctor`: each check says ok, missing or FAILED for the right reasons, and how to mend it."""

from __future__ import annotations

import http.server
import json
import os
import threading
from importlib.metadata import metadata, requires

import pytest
from support import LAB_BASE, LAB_SMALL, write_jsonl

from duet.cache.errors import EXIT_DONE, EXIT_USER
from duet.pipeline.cli.main import main
from duet.pipeline.commands import checks as doctor
from duet.pipeline.commands import doctor as surroundings
from duet.pipeline.commands.checks import FAILED, MISSING, OK, Check, Gpu
from duet.pipeline.config.load import load_config

REQUIREMENTS = ["torch>=2.7", "numpy>=2.0", "odd>=1; python_version < '3'", 'x>=2; extra == "a"', 'y; extra == "b"']
GPU = Gpu("NVIDIA A100", 80 * 10**9, True)
VERSIONS = {"torch": "2.9.0", "numpy": "2.1", "x": "2.0"}

CHECKS = {
    "python": (lambda: doctor.python_check("3.12.1", ">=3.11"), OK, "3.12.1"),
    "old python": (lambda: doctor.python_check("3.10.9", ">=3.11"), FAILED, "expected >=3.11"),
    "packages": (lambda: doctor.packages_check(REQUIREMENTS, VERSIONS.get), OK, "all 2"),
    "no package": (lambda: doctor.packages_check(REQUIREMENTS, {"torch": "2.9"}.get), FAILED, "numpy is not installed"),
    "old package": (lambda: doctor.packages_check(["torch>=2.7"], {"torch": "2.1"}.get), FAILED, "torch is 2.1, expected"),
    "local version": (lambda: doctor.packages_check(["torch>=2.7"], {"torch": "2.13.0+cpu"}.get), OK, "all 1"),
    "torch": (lambda: doctor.torch_check("2.9"), OK, "2.9"),
    "no torch": (lambda: doctor.torch_check(None, "libcudart.so: cannot open"), FAILED, "libcudart"),
    "gpu": (lambda: doctor.gpu_check([GPU], True, True), OK, "NVIDIA A100, 80 GB, bfloat16"),
    "no bf16": (lambda: doctor.gpu_check([Gpu("T4", 16 * 10**9, False)], True, False), OK, "no bfloat16"),
    "no gpu": (lambda: doctor.gpu_check([], False, False), MISSING, "all runs on the CPU"),
    "gpu not seen": (lambda: doctor.gpu_check([], True, False), MISSING, "torch sees none"),
    "gpu wanted": (lambda: doctor.gpu_check([], False, True), FAILED, "device: cuda"),
    "vllm": (lambda: doctor.vllm_check(None, "vllm 0.32"), OK, "0.32"),
    "no vllm": (lambda: doctor.vllm_check("the package vllm is not installed", ""), MISSING, "not installed"),
    "vllm wanted": (lambda: doctor.vllm_check("not installed", "", "teacher: vllm"), FAILED, "needed for teacher: vllm"),
    "disk": (lambda: doctor.disk_check("runs_dir", "runs", 10**12), OK, "1,000.0 GB free in runs"),
    "full disk": (lambda: doctor.disk_check("runs_dir", "runs", 10**9, 10**10), FAILED, "up to 10.0 GB needed"),
    "memory": (lambda: doctor.memory_check(8 * 10**9), OK, "8.0 GB free"),
    "little memory": (lambda: doctor.memory_check(10**9), FAILED, "1.0 GB free"),
    "unknown memory": (lambda: doctor.memory_check(None), MISSING, "does not tell"),
    "hub": (lambda: doctor.hub_check("hub.org", False, None, True), OK, "with a token"),
    "no hub": (lambda: doctor.hub_check("hub.org", False, "timed out", False), MISSING, "cannot be reached: timed out"),
    "offline": (lambda: doctor.hub_check("hub.org", True, None, False), MISSING, "HF_HUB_OFFLINE is set"),
    "slurm": (lambda: doctor.slurm_check({"sbatch": True, "sinfo": True}, (0, "gpu cpu")), OK, "gpu cpu"),
    "no slurm": (lambda: doctor.slurm_check({"sbatch": False, "sinfo": False}, None), MISSING, "not on this machine"),
    "half a slurm": (lambda: doctor.slurm_check({"sbatch": True, "sinfo": False}, None), MISSING, "sinfo not on PATH"),
    "dumb slurm": (lambda: doctor.slurm_check({"sbatch": True}, (1, "no controller")), MISSING, "no controller"),
    "browser": (lambda: doctor.browser_check("/usr/bin/chromium"), OK, "/usr/bin/chromium"),
    "no browser": (lambda: doctor.browser_check(None), MISSING, "is on PATH"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_says_what_it_found_and_how_to_mend_it(name):
    check, state, found = CHECKS[name]
    result = check()
    assert result.state == state
    assert found in result.found
    assert bool(result.hint) == (state != OK)


def test_extras_are_optional_unless_the_config_needs_them():
    def states(needed: dict[str, str]) -> dict[str, str]:
        checks = doctor.extra_checks(["a", "b", "dev"], REQUIREMENTS, VERSIONS.get, needed)
        return {check.name: check.state for check in checks}

    assert states({}) == {"extra a": OK, "extra b": MISSING}
    assert states({"b": "train.trackers"}) == {"extra a": OK, "extra b": FAILED}
    assert states({"of-another-version": "x"})["extra of-another-version"] == FAILED
    [check] = doctor.extra_checks(["b"], REQUIREMENTS, VERSIONS.get, {"b": "train.trackers"})
    assert "needed for train.trackers" in check.found
    assert check.hint == "pip install 'duet-unlearn[b]'"


def test_our_own_metadata_can_be_read_that_way():
    assert doctor.packages_check(requires("duet-unlearn") or [], surroundings.version_of).state == OK
    checks = doctor.extra_checks(
        metadata("duet-unlearn").get_all("Provides-Extra") or [], requires("duet-unlearn") or [], lambda name: None, {}
    )
    assert {check.name for check in checks} >= {"extra tensorboard", "extra 8bit", "extra datasets"}
    assert {check.state for check in checks} == {MISSING}


def test_what_a_config_needs(lab_config, tmp_path):
    config = load_config(str(lab_config(
        train__optimizer="adamw8bit", train__trackers=["wandb"], teacher__engine="vllm", store__dir="s3://bucket/x",
        data__forget={"path": "hf://a/b"},
        students=[{"name": "s", "model": str(LAB_SMALL), "train": {"trackers": ["trackio"]}}],
        requests=[{"name": "r", "topic": "t", "data": {"forget": {"path": "r.jsonl"}}}],
        evaluate__lm_eval=[{"task": "x", "num_fewshot": 0}],
    )))  # fmt: skip
    needed = doctor.needed_extras(config)
    assert set(needed) == {"8bit", "wandb", "trackio", "s3", "lm-eval", "datasets"}
    assert needed["datasets"] == "data.forget.path"
    assert list(doctor.data_of(config)) == ["data.forget", "data.retain", "requests.0.data.forget"]
    assert doctor.models_of(config)["students.s.model"] == str(LAB_SMALL)
    assert doctor.engine_needed(config) == "teacher teacher: vllm"


def states(capsys) -> dict[str, Check]:
    return {check["name"]: Check(**check) for check in json.loads(capsys.readouterr().out)["checks"]}


def test_a_sound_config_passes_and_a_faulty_one_fails_where_it_is_faulty(lab_config, tmp_path, capsys):
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"question": "Who is Anna Berg?"}])
    path = str(lab_config(data__broad={"asked": {"path": str(asked)}}))
    assert main(["doctor", "--config", path, "--json"]) == EXIT_DONE
    checks = states(capsys)
    assert checks["data.broad.asked"].state == OK, "broad rows need no answers"
    assert checks["teacher.model"].state == OK
    assert checks["data.forget"].found.endswith("15 questions")
    assert "transformers" in checks["engine of teacher"].found
    empty = str(write_jsonl(tmp_path / "empty.jsonl", []))
    faulty = ["--set", f"data.forget.path={empty}", "--set", f"teacher.model={tmp_path}"]
    assert main(["doctor", "--config", path, "--json", *faulty]) == EXIT_USER
    checks = states(capsys)
    assert {name for name, check in checks.items() if check.state == FAILED} == {"teacher.model", "data.forget"}
    assert main(["doctor", "--config", path, "-q", *faulty]) == EXIT_USER
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("FAILED: teacher.model, data.forget (")
    assert main(["doctor", "--config", "nowhere.yaml", "--json"]) == EXIT_USER
    assert states(capsys)["config"].state == FAILED


def test_every_line_is_followed_by_its_hint(capsys):
    main(["doctor"])
    *lines, last = capsys.readouterr().out.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        assert line.startswith(("ok ", "missing (optional) ", "FAILED ", " "))
        assert after.strip().startswith("hint: ") == line.startswith(("missing", "FAILED"))
    assert "checks" in last


def test_a_token_is_never_told(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    main(["doctor", "--json"])
    out, err = capsys.readouterr()
    assert "hf_secret" not in out + err


def test_a_hub_that_answers_and_one_that_does_not():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501 to anything
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert surroundings._unreachable(url) == "it answers 501"
    thread.join()
    server.server_close()
    assert "refused" in (surroundings._unreachable(url) or "")


@pytest.mark.parametrize(("script", "expected"), [("echo gpu", (0, "gpu")), ("echo down >&2; exit 1", (1, "down"))])
def test_sinfo_is_asked(tmp_path, monkeypatch, script, expected):
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert surroundings._sinfo() == expected


def test_models_are_looked_for_and_not_fetched(monkeypatch, tmp_path):
    assert surroundings.model_check("teacher.model", str(LAB_BASE)).state == OK
    assert surroundings.model_check("teacher.model", "./nowhere").state == FAILED
    assert surroundings.model_check("teacher.model", "no id/at all").state == FAILED
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check = surroundings.model_check("teacher.model", "owner/never-fetched")
    assert check.state == FAILED
    assert check.hint
