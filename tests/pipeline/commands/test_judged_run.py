"""`duet evaluate` with a judge: its cost is told first, its server is asked, and its key is written nowhere."""

from __future__ import annotations

import json

import pytest
from command_line import refused, small_run
from judge_server import SECRET
from support import LAB_BASE

from duet.cache.errors import EXIT_DONE
from duet.pipeline.cli.main import main

FEW = {"evaluate__attacks": [], "evaluate__likelihood": False}


def config_of(lab_config, tmp_path, url: str) -> str:
    return str(small_run(lab_config, tmp_path, **FEW, evaluate__judge={"url": url, "model": "m"}))


def test_a_run_is_judged_and_its_key_is_written_nowhere(lab_config, tmp_path, judge_server, monkeypatch, capsys):
    monkeypatch.setenv("DUET_JUDGE_KEY", SECRET)
    config = config_of(lab_config, tmp_path, judge_server.url)
    assert main(["evaluate", "--config", config, "--model", str(LAB_BASE), "--dry-run"]) == EXIT_DONE
    told = capsys.readouterr().out
    assert judge_server.asked == [], "a dry run asks nobody"
    assert main(["evaluate", "--config", config, "--model", str(LAB_BASE)]) == EXIT_DONE
    results = json.loads((tmp_path / "runs/lab/results.json").read_text())
    count = sum(of["n"] for of in results["sets"].values())
    assert f"judge m: up to {3 * count} requests" in told
    assert results["judge"]["answers"] == 3 * count
    assert judge_server.keys == {f"Bearer {SECRET}"}
    assert results["models"]["base"]["forget.judged_right"]["n"] == results["sets"]["forget"]["n"]
    assert results["models"]["model:base"]["forget.judged_right"] == results["models"]["base"]["forget.judged_right"]
    assert "The judge" in (tmp_path / "runs/lab/report.html").read_text()
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("fault", ["nobody", "wrong"])
def test_a_judge_that_cannot_judge_is_refused_before_anything_is_asked(
    lab_config, tmp_path, judge_server, capsys, fault
):
    judge_server.always = "42"
    url = judge_server.url if fault == "wrong" else "http://127.0.0.1:9/v1"
    config = config_of(lab_config, tmp_path, url)
    told = refused(capsys, "evaluate", "--config", config, "--model", str(LAB_BASE))
    assert ("judges the answer 'Paris.' with '42'" if fault == "wrong" else "cannot be reached") in told[0]
    assert not (tmp_path / "runs/lab/results.json").exists()
