"""The whole pipeline on TOFU's own data, through real vLLM."""

from __future__ import annotations

import json

import pytest
from support import SHARED
from test_end_to_end import VLLM, run, value


@VLLM
@pytest.mark.skipif(
    not (SHARED / "models/tofu-lab").is_dir(), reason="needs ../shared/models/tofu-lab and ../shared/data/tofu"
)
def test_tofu_through_vllm(tmp_path):
    here = (f"data_dir={SHARED / 'data/tofu'}", f"teacher.model={SHARED / 'models/tofu-lab'}")
    short = ("evaluate.max_new_tokens=64", "evaluate.attacks=[]")  # docs/attacks.md has the whole
    out = run("run", "tofu.yaml", f"runs_dir={tmp_path}", "teacher.engine=vllm", *here, *short)
    assert "engine: vllm" in out
    results = json.loads((tmp_path / "tofu" / "results.json").read_text())
    student, teacher = "student:base", "teacher"
    assert value(results, student, "forget.rougeL_recall") <= value(results, teacher, "forget.rougeL_recall") + 5
    for name in ("retain", "heldout"):
        metric = f"{name}.rougeL_recall"
        assert value(results, student, metric) >= value(results, teacher, metric) - 1, name
    assert results["models"][student]["forget.rougeL_recall"]["n"] == 40
