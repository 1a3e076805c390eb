"""Engines: the transformers one against a plain forward pass, and the self-test against engines that are wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LAB_SMALL
from transformers import LlamaConfig, LlamaForCausalLM

from cache.errors import UserError
from stages.alignment import align
from stages.engine import EngineSpec, Scored, open_engine, self_test
from stages.engine_transformers import TransformersEngine
from stages.models import eos_ids, load_config, load_model, load_tokenizer

TOP_K = 7


@pytest.fixture(scope="module")
def spec() -> EngineSpec:
    tokenizer, config = load_tokenizer(LAB_SMALL), load_config(LAB_SMALL)
    return EngineSpec(LAB_SMALL, "float32", len(tokenizer), 192, tuple(eos_ids(LAB_SMALL, config, tokenizer)), "cpu")


@pytest.fixture(scope="module")
def engine(spec) -> TransformersEngine:
    return TransformersEngine(spec)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(LAB_SMALL)
    texts = ("Where was Bo born?", "What is the hobby of a very long name, Aurelio Quillsby of Umberlee?", "Hi")
    return [tokenizer(f"<bos><|user|>{text}<|assistant|>", add_special_tokens=False)["input_ids"] for text in texts]


def test_scores_are_the_logits_of_a_plain_forward_pass(engine, prompts):
    """Teacher forcing the greedy response, one prompt at a time and without any cache, gives the same rows."""
    model = load_model(LAB_SMALL, "float32")
    for prompt, scored in zip(prompts, engine.score(prompts, TOP_K, 3), strict=True):
        batch = align([prompt], [scored.response_ids], 0)
        with torch.no_grad():
            logits = model(batch.input_ids_BT).logits[batch.batch_index_N, batch.position_N]
        top = logits.topk(TOP_K, dim=-1)
        assert np.array_equal(scored.topk_ids_PK, top.indices.numpy())
        assert np.abs(scored.topk_logits_PK - top.values.numpy()).max() < 1e-3
        assert np.abs(scored.logsumexp_P - logits.logsumexp(-1).numpy()).max() < 1e-3
        assert np.array_equal(scored.response_ids, top.indices[:, 0].numpy())


def test_a_response_ends_with_the_first_end_of_sequence(engine, spec, prompts):
    for scored, generated in zip(engine.score(prompts, TOP_K, 16), engine.generate(prompts, 16), strict=True):
        assert not set(scored.response_ids[:-1].tolist()) & set(spec.eos_ids)
        ended = scored.response_ids[-1] in spec.eos_ids
        assert generated == scored.response_ids[: -1 if ended else None].tolist()


def test_batch_composition_does_not_change_a_row(engine, prompts):
    together, alone = engine.score(prompts, TOP_K, 1), [engine.score([p], TOP_K, 1)[0] for p in prompts]
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(a.topk_ids_PK, b.topk_ids_PK)
        assert np.abs(a.topk_logits_PK - b.topk_logits_PK).max() < 1e-3


def test_head_padding_never_counts(tmp_path, spec, prompts):
    """A head 60 rows wider than the tokenizer, its padding rows with the largest logits of all."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=spec.num_ids + 60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[spec.num_ids :] *= 100
    model.save_pretrained(tmp_path / "padded")
    engine = TransformersEngine(replace(spec, model_dir=tmp_path / "padded", eos_ids=()))
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0]])).logits[0, -1]
    assert int(logits.argmax()) >= spec.num_ids, "the fixture must tempt the engine"
    scored = engine.score(prompts, TOP_K, 2)
    assert max(s.topk_ids_PK.max() for s in scored) < spec.num_ids
    assert max(s.response_ids.max() for s in scored) < spec.num_ids
    self_test(engine, prompts, TOP_K, spec.num_ids)


class Wrong:
    """The real engine with one fault in what it returns."""

    def __init__(self, engine, fault):
        self.name, self.dtype, self._engine, self._fault, self._calls = "wrong 1.0", engine.dtype, engine, fault, 0

    def score(self, prompts, top_k, max_positions):
        self._calls += 1
        return [self._fault(s, self._calls) for s in self._engine.score(prompts, top_k, max_positions)]


def log_probabilities(s: Scored, call: int) -> Scored:
    return replace(s, topk_logits_PK=s.topk_logits_PK - s.logsumexp_P[:, None])


def rows_shifted_by_one(s: Scored, call: int) -> Scored:
    return replace(
        s, topk_ids_PK=np.roll(s.topk_ids_PK, 1, axis=0), topk_logits_PK=np.roll(s.topk_logits_PK, 1, axis=0)
    )


def stale_prefix_cache(s: Scored, call: int) -> Scored:
    return replace(s, topk_logits_PK=s.topk_logits_PK + (0.1 if call == 2 else 0))


def wrong_continuation(s: Scored, call: int) -> Scored:
    return replace(s, topk_logits_PK=s.topk_logits_PK * (1.05 if call == 3 else 1))


def padding_ids(s: Scored, call: int) -> Scored:
    ids = s.topk_ids_PK.copy()
    ids[0, -1] = 100_000
    return replace(s, topk_ids_PK=ids)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (log_probabilities, "log-probabilities, not raw logits"),
        (rows_shifted_by_one, "shifted|after a longer prompt"),
        (stale_prefix_cache, "prefix cache"),
        (wrong_continuation, "after a longer prompt"),
        (padding_ids, "padding of the head"),
    ],
)
def test_the_self_test_fails_loudly(engine, prompts, spec, fault, message):
    self_test(engine, prompts, TOP_K, spec.num_ids)
    with pytest.raises(UserError, match=message) as caught:
        self_test(Wrong(engine, fault), prompts, TOP_K, spec.num_ids)
    assert "wrong 1.0" in caught.value.what


def test_vllm_where_it_is_not_installed(spec, monkeypatch):
    monkeypatch.setattr("stages.engine.vllm_fault", lambda: "the package vllm is not installed")
    engine, reason = open_engine(spec, "auto")
    assert engine.name.startswith("transformers")
    assert "not installed" in reason
    with pytest.raises(UserError, match="not installed"):
        open_engine(spec, "vllm")
