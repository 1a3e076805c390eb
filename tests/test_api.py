"""What `import duet` offers: cheap to import, complete, documented, and the documentation's examples run as they stand."""

from __future__ import annotations

import inspect
import re
import signal
import subprocess
import sys

import pytest
import torch
from command_line import small_run
from support import LAB_ORACLE, ROOT, make_plan, make_rows, write_store

import duet

PAGE = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
HEAVY = ("torch", "transformers", "vllm", "numpy", "pyarrow", "pydantic", "yaml", "click")


def test_importing_it_loads_nothing_heavy():
    code = f"import sys, duet; dir(duet); print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", duet.__all__)
def test_every_name_is_there_with_a_docstring_and_types(name):
    public = getattr(duet, name)
    assert name in dir(duet)
    if inspect.isfunction(public):
        assert public.__doc__
        parameters = inspect.signature(public).parameters.values()
        assert all(parameter.annotation is not parameter.empty for parameter in parameters)
        assert f".{name}\n" in PAGE, "it stands in docs/reference/api.md"
    elif inspect.isclass(public):
        assert public.__doc__


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="open_store"):
        duet.open_shop  # noqa: B018


@pytest.mark.parametrize("name", ["huber_raw", "forward_kl_tail"])
def test_the_loss_of_equal_logits_is_zero_and_its_gradient_leads_there(name):
    generator = torch.Generator().manual_seed(0)
    teacher_NV = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    values_NK, ids_NK = teacher_NV.topk(5)
    logsumexp_N = teacher_NV.logsumexp(-1)
    assert duet.topk_loss(name, teacher_NV, ids_NK, values_NK, logsumexp_N).abs().max() < 1e-9
    student_NV = torch.randn(3, 50, generator=generator, dtype=torch.float64, requires_grad=True)
    before = duet.topk_loss(name, student_NV, ids_NK, values_NK, logsumexp_N)
    assert before.shape == (3,)
    before.sum().backward()
    assert student_NV.grad is not None
    after = duet.topk_loss(name, student_NV - 0.05 * student_NV.grad, ids_NK, values_NK, logsumexp_N)
    assert (after < before).all()


def test_a_loss_with_a_tail_asks_for_the_log_sum_exp():
    values = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="log-sum-exp"):
        duet.topk_loss("forward_kl_tail", torch.zeros(1, 4), torch.tensor([[0, 1]]), values)


def test_the_pages_examples_run(lab_config, tmp_path, monkeypatch):
    """In a folder with a store, and with a small experiment under the name of the lab's."""
    write_store(tmp_path / "store", make_plan(10, 4), make_rows(range(10), None, forget=4))
    (tmp_path / "configs").mkdir()
    small_run(lab_config, tmp_path, evaluate__attacks=[], evaluate__control_model=str(LAB_ORACLE)).rename(
        tmp_path / "configs" / "lab.yaml"
    )
    monkeypatch.chdir(tmp_path)
    handlers = signal.getsignal(signal.SIGINT)
    found: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "api.md", "exec"), found)
    assert sum(len(rows) for rows in found["store"].rows()) == 10
    assert found["loss"].item() > 0
    assert found["results"]["outcomes"].keys() == {"base", "teacher", "student:base"}
    assert found["run_dir"].name == "from-python"
    assert signal.getsignal(signal.SIGINT) is handlers
