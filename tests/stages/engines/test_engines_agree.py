"""Both engines, on tiny random models of every architecture that we name: the ids and raw logits of the student's own forward.

The reference is plain transformers with "eager" attention, the one that does all that a config says, one whole sequence
at a time and without a cache. Prompts are longer than sliding windows and than a block of vLLM's prefix cache, and the
second call to an engine reads from that cache.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from support import LAB_BASE, LAB_VOCAB_SIZE, ROOT
from tiny_models import tiny_config, tiny_model

from duet.stages.engines.interface import EngineSpec, Scored
from duet.stages.engines.transformers_engine import TransformersEngine
from duet.stages.models.alignment import align
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer

HEAD_DIM = 32  # the smallest that vLLM's CPU kernels know
PADDING = 60  # rows of the head without a token, fewer than the margin that the vLLM engine asks for
CONTEXT, TOP_K, POSITIONS = 256, 7, (1, 5)
# Of logits up to 5 in float32, where 2e-6 is seen; what is looked for is a hundred times this, and more.
TOLERANCE = 3e-5

NAMES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "mistral", "cohere", "granite")
PADDED = "llama with head padding"
# A config without something that its architecture does: it must show in the numbers, or nothing is tested.
WITHOUT = [
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"sliding_window": CONTEXT}),
    ("gemma3", {"final_logit_softcapping": None}),
    ("gemma3", {"sliding_window": CONTEXT}),
    ("mistral", {"sliding_window": None}),
    ("cohere", {"logit_scale": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
]
SOFT_CAPPED = ("gemma2", "gemma3")
VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(),
    reason="needs vLLM's build for the CPU, whose float32 is the reference's: `make setup` says why it is not there",
)


def prompts() -> list[list[int]]:
    """Short, longer than a window, and two with a common start longer than a block of the prefix cache (128 tokens)."""
    draw = np.random.default_rng(0)
    short, long, start, *ends = (draw.integers(3, LAB_VOCAB_SIZE, size).tolist() for size in (3, 40, 140, 9, 14))
    return [[1, *ids] for ids in (short, long, *(start + end for end in ends))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory per model, with the lab's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(LAB_BASE)
    for name in (*NAMES, PADDED):
        width = LAB_VOCAB_SIZE + (PADDING if name == PADDED else 0)
        sizes = {"hidden_size": 2 * HEAD_DIM, "head_dim": HEAD_DIM, "max_position_embeddings": CONTEXT}
        model = tiny_model(tiny_config(name.split()[0], width, **sizes))
        if name == PADDED:
            with torch.no_grad():
                model.lm_head.weight[LAB_VOCAB_SIZE:] *= 10
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def by_vllm(folder: Path) -> dict[str, list[list[Scored]]]:
    """Real vLLM with every model, one after the other in one process of its own."""
    asked = {
        "prompts": prompts(),
        "top_k": TOP_K,
        "positions": POSITIONS,
        "num_ids": LAB_VOCAB_SIZE,
        "context": CONTEXT,
    }
    (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    command = [sys.executable, str(ROOT / "tests/helpers/vllm_scores.py"), str(folder), *NAMES, PADDED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return pickle.loads((folder / "scored.pickle").read_bytes())


@cache
def by_transformers(model_dir: Path) -> list[list[Scored]]:
    engine = TransformersEngine(EngineSpec(model_dir, "float32", LAB_VOCAB_SIZE, CONTEXT, (), "cpu"))
    return [engine.score(prompts(), TOP_K, count) for count in POSITIONS]


def plain(model_dir: Path, **changes: Any) -> Any:
    more = {"attn_implementation": "eager", "dtype": torch.float32} | changes
    return hf.AutoModelForCausalLM.from_pretrained(model_dir, **more).eval()


# Shapes: N all rows of all calls, K kept ids, V vocabulary (without head padding).


def rows_of(calls: list[list[Scored]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits [N, K] that an engine returned, of which the first is the greedy one."""
    scored = [one for call in calls for one in call]
    assert [len(one.response_ids) for one in scored] == [count for count in POSITIONS for _ in prompts()]
    ids_NK, logits_NK = (
        np.concatenate([getattr(one, f"topk_{what}_PK") for one in scored]) for what in ("ids", "logits")
    )
    assert np.array_equal(np.concatenate([one.response_ids for one in scored]), ids_NK[:, 0])
    return ids_NK, logits_NK


def own_rows(model: Any, calls: list[list[Scored]]) -> torch.Tensor:
    """The model's own logits [N, V] that predict the responses, at the rows that alignment names."""
    rows = []
    for prompt, one in ((prompt, one) for scored in calls for prompt, one in zip(prompts(), scored, strict=True)):
        batch = align([prompt], [one.response_ids], 0)
        with torch.no_grad():
            logits_BTV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        rows.append(logits_BTV[batch.batch_index_N, batch.position_N, :LAB_VOCAB_SIZE])
    return torch.cat(rows)


def assert_own(model: Any, calls: list[list[Scored]]) -> None:
    """What an engine returned is the top of the model's own rows."""
    top = own_rows(model, calls).topk(TOP_K)
    assert_same(rows_of(calls), (top.indices.numpy(), top.values.numpy()))


def assert_same(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    """Sorted logits are near, and ids the same except where a neighbour's logit is as near as that."""
    (ids_NK, logits_NK), (expected_ids_NK, expected_NK) = found, expected
    assert np.abs(logits_NK - expected_NK).max() < TOLERANCE
    far_NK = expected_NK[:, :-1] - expected_NK[:, 1:] > 2 * TOLERANCE
    settled_NK = np.pad(far_NK, ((0, 0), (1, 0)), constant_values=True)[:, :-1] & far_NK  # not the last: who is next?
    assert settled_NK[:, 0].all(), "which id is the most likely must not be open"
    assert settled_NK.mean() > 0.9
    assert np.array_equal(ids_NK[:, :-1][settled_NK], expected_ids_NK[:, :-1][settled_NK])


@VLLM
@pytest.mark.parametrize("name", [*NAMES, PADDED])
def test_vllm_returns_the_models_own_logits(by_vllm, folder, name):
    assert_own(plain(folder / name), by_vllm[name])


@pytest.mark.parametrize("name", [*NAMES, PADDED])
def test_the_transformers_engine_returns_the_models_own_logits(folder, name):
    assert_own(plain(folder / name), by_transformers(folder / name))


@VLLM
@pytest.mark.parametrize("name", [*NAMES, PADDED])
def test_the_engines_agree(by_vllm, folder, name):
    assert_same(rows_of(by_vllm[name]), rows_of(by_transformers(folder / name)))


@pytest.mark.parametrize("name", NAMES)
def test_the_student_is_loaded_as_its_config_says(folder, name):
    calls = by_transformers(folder / name)
    own, loaded = (own_rows(model, calls) for model in (plain(folder / name), load_model(folder / name, "float32")))
    assert float((own - loaded).abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", SOFT_CAPPED)
def test_the_transformers_engine_captures_logits_after_the_soft_cap(folder, name):
    assert_capped(folder / name, by_transformers(folder / name))


@VLLM
@pytest.mark.parametrize("name", SOFT_CAPPED)
def test_vllm_captures_logits_after_the_soft_cap(by_vllm, folder, name):
    assert_capped(folder / name, by_vllm[name])


def assert_capped(model_dir: Path, calls: list[list[Scored]]) -> None:
    cap = hf.AutoConfig.from_pretrained(model_dir).final_logit_softcapping
    before_NK = own_rows(plain(model_dir, final_logit_softcapping=None), calls).topk(TOP_K).values
    _, found_NK = rows_of(calls)
    assert float(before_NK.max()) > cap > found_NK.max(), "the cap must bite"
    assert np.abs(found_NK - cap * torch.tanh(before_NK / cap).numpy()).max() < TOLERANCE


@pytest.mark.parametrize(("name", "without"), WITHOUT)
def test_what_an_architecture_does_shows_in_its_logits(folder, name, without):
    calls = by_transformers(folder / name)
    own, other = (own_rows(model, calls) for model in (plain(folder / name), plain(folder / name, **without)))
    assert float((own - other).abs().max()) > 100 * TOLERANCE


def test_the_fixtures_head_padding_has_the_largest_logits(folder):
    with torch.no_grad():
        logits_BTV = plain(folder / PADDED)(torch.tensor(prompts()[:1])).logits
    assert int(logits_BTV[0, -1].argmax()) >= LAB_VOCAB_SIZE
