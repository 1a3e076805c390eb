"""Engines: the transformers one against a plain forward pass, and the self-test against engines that are wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAB_SMALL
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from duet.cache.errors import UserError
from duet.stages.engines import transformers_engine
from duet.stages.engines.choose import open_engine
from duet.stages.engines.interface import Ask, EngineSpec, Request, Scored
from duet.stages.engines.self_test import self_test
from duet.stages.engines.topk import LARGE_VOCABULARY, drawn, top_k
from duet.stages.engines.transformers_engine import TransformersEngine
from duet.stages.models.alignment import align
from duet.stages.models.directory import load_config
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import eos_ids, load_tokenizer

TOP_K = 7
HYBRIDS = {
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.fixture(scope="module")
def spec() -> EngineSpec:
    tokenizer, config = load_tokenizer(LAB_SMALL), load_config(LAB_SMALL)
    return EngineSpec(LAB_SMALL, "float32", len(tokenizer), 192, tuple(eos_ids(LAB_SMALL, config, tokenizer)), "cpu")


@pytest.fixture(scope="module")
def engine(spec) -> TransformersEngine:
    return TransformersEngine(spec)


@pytest.fixture(scope="module")
def model():
    return load_model(LAB_SMALL, "float32")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(LAB_SMALL)
    texts = ("Where was Bo born?", "What is the hobby of a very long name, Aurelio Quillsby of Umberlee?", "Hi")
    return [tokenizer(f"<bos><|user|>{text}<|assistant|>", add_special_tokens=False)["input_ids"] for text in texts]


def requests(prompts, **more) -> list[Request]:
    return [Request(number, ids, **more) for number, ids in enumerate(prompts)]


def test_given_and_made_responses_come_from_one_stream_as_they_do_apart(engine, prompts):
    """A store has documents beside questions: neither kind changes what the other gets."""
    ask = Ask(TOP_K, 3, logsumexp=True)
    made = requests(prompts)
    documents = [Request(10 + n, ids[:2], given_ids=[*ids[2:], 7][: 4 + n]) for n, ids in enumerate(prompts[:2])]
    mixed = dict(engine.stream([made[0], documents[0], *made[1:], documents[1]], ask))
    apart = dict(engine.stream(made, ask)) | dict(engine.stream(documents, ask))
    assert mixed.keys() == apart.keys()
    for key, scored in apart.items():
        assert np.array_equal(mixed[key].response_ids, scored.response_ids)
        assert np.array_equal(mixed[key].topk_logits_PK, scored.topk_logits_PK)
    for request in documents:
        assert mixed[request.key].response_ids.tolist() == list(request.given_ids)


def forward(model, prompt, response) -> torch.Tensor:
    """The rows of a plain forward pass, without any cache or padding, that predict the response."""
    batch = align([prompt], [response], 0)
    with torch.no_grad():
        return model(batch.input_ids_BT).logits[batch.batch_index_N, batch.position_N]


def check_against_forward(model, prompt, scored: Scored) -> None:
    logits = forward(model, prompt, scored.response_ids)
    top = logits.topk(TOP_K, dim=-1)
    assert np.array_equal(scored.topk_ids_PK, top.indices.numpy())
    assert np.abs(scored.topk_logits_PK - top.values.numpy()).max() < 1e-3
    assert np.abs(scored.logsumexp_P - logits.logsumexp(-1).numpy()).max() < 1e-3


def test_scores_are_the_logits_of_a_plain_forward_pass(engine, model, prompts):
    """Teacher forcing the greedy response, one prompt at a time and without any cache, gives the same rows."""
    results = engine.score_all(requests(prompts), Ask(TOP_K, 3, logsumexp=True))
    for prompt, scored in zip(prompts, results, strict=True):
        check_against_forward(model, prompt, scored)
        assert np.array_equal(scored.response_ids, scored.topk_ids_PK[:, 0])


@pytest.mark.parametrize("tokens", [1, 2, 99])
def test_a_given_response_is_scored_and_not_changed(engine, spec, model, prompts, tokens, monkeypatch):
    """However many tokens of each are read in one pass."""
    monkeypatch.setattr(transformers_engine, "BLOCK_LOGITS", tokens * len(prompts) * model.config.vocab_size)
    responses = [[7, 900, 3], [12], [5, 5, 5, 5, 5]]
    asked = [Request(n, p, given_ids=r) for n, (p, r) in enumerate(zip(prompts, responses, strict=True))]
    for prompt, response, scored in zip(
        prompts, responses, engine.score_all(asked, Ask(TOP_K, 3, logsumexp=True)), strict=True
    ):
        assert scored.response_ids.tolist() == response
        check_against_forward(model, prompt, scored)
    self_test(engine, [replace(r, given_ids=[7, 900]) for r in asked], Ask(TOP_K, 2, True), spec.num_ids, "small")


def test_sampled_responses_depend_on_their_seeds_alone(engine, model, prompts):
    ask = Ask(TOP_K, 6, logsumexp=True, temperature=3.0)
    asked = [Request(n, p, seed=n) for n, p in enumerate(prompts)]
    together = engine.score_all(asked, ask)
    alone = [engine.score_all([request], ask)[0] for request in asked]
    others = engine.score_all([replace(request, seed=9) for request in asked], ask)
    for prompt, a, b in zip(prompts, together, alone, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        check_against_forward(model, prompt, a)
    assert [s.response_ids.tolist() for s in together] != [s.response_ids.tolist() for s in others]


def test_sampled_ids_are_the_same_of_made_and_of_given_responses(engine, spec, model, prompts):
    ask = Ask(TOP_K, 3, logsumexp=True, ids="sampled")
    made = engine.score_all([Request(n, p, seed=n) for n, p in enumerate(prompts)], ask)
    asked = [Request(n, p, s.response_ids.tolist(), n) for n, (p, s) in enumerate(zip(prompts, made, strict=True))]
    for prompt, a, b in zip(prompts, made, engine.score_all(asked, ask), strict=True):
        assert np.array_equal(a.topk_ids_PK, b.topk_ids_PK)
        assert np.array_equal(a.draws_PK, b.draws_PK)
        assert (a.draws_PK.sum(1) == TOP_K - 1).all()
        logits = forward(model, prompt, a.response_ids).numpy()
        assert np.abs(np.take_along_axis(logits, a.topk_ids_PK.astype(int), 1) - a.topk_logits_PK).max() < 1e-3
        assert len({tuple(draws) for draws in a.topk_ids_PK.tolist()}) == len(a.topk_ids_PK)
    self_test(engine, asked, ask, spec.num_ids, "small")


@pytest.mark.parametrize("shared", [0, 1, 300])
def test_what_prompts_begin_with_changes_nothing(engine, spec, model, prompts, shared):
    """A prefix of 0, 1 and 300 tokens, computed once and for each row anew."""
    prefix = np.random.default_rng(0).integers(5, spec.num_ids, shared).tolist()
    prompts = [[*prefix, *prompt] for prompt in prompts]
    alone = TransformersEngine(replace(spec, share_prefix=False))
    before = engine.usage.cached_tokens
    ask = Ask(TOP_K, 4, logsumexp=True)
    once, anew = engine.score_all(requests(prompts), ask), alone.score_all(requests(prompts), ask)
    for prompt, a, b in zip(prompts, once, anew, strict=True):
        check_against_forward(model, prompt, a)
        assert np.array_equal(a.topk_ids_PK, b.topk_ids_PK)
        assert np.abs(a.topk_logits_PK - b.topk_logits_PK).max() < 1e-3
    in_common = next(i for i in range(999) if len({p[i] for p in prompts}) > 1)
    assert engine.usage.cached_tokens - before == (len(prompts) * in_common if in_common >= 16 else 0)
    assert alone.usage.cached_tokens == 0


def test_rows_stream_through_in_bounded_memory(spec, prompts):
    """Requests are drawn as results are taken: never more than a window ahead."""
    engine = TransformersEngine(replace(spec, batch_size=2))
    drawn = 0

    def feed():
        nonlocal drawn
        for number in range(100):
            drawn += 1
            yield Request(number, prompts[number % 3])

    found = []
    for key, _ in engine.stream(feed(), Ask(TOP_K, 1)):
        found.append(key)
        assert drawn <= len(found) - 1 + 2 * 16
    assert sorted(found) == list(range(100))


def test_a_response_ends_with_the_first_end_of_sequence(engine, spec, prompts):
    ended = 0
    for scored, generated in zip(engine.score(prompts, TOP_K, 16), engine.generate(prompts, 16), strict=True):
        assert not set(scored.response_ids[:-1].tolist()) & set(spec.eos_ids)
        ends = scored.response_ids[-1] in spec.eos_ids
        assert generated == scored.response_ids[: -1 if ends else None].tolist()
        ended += ends
    assert ended, "the fixture must have a response that ends"


def test_batch_composition_does_not_change_a_row(engine, prompts):
    together, alone = engine.score(prompts, TOP_K, 1), [engine.score([p], TOP_K, 1)[0] for p in prompts]
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(a.topk_ids_PK, b.topk_ids_PK)
        assert np.abs(a.topk_logits_PK - b.topk_logits_PK).max() < 1e-3


def test_draws_follow_the_softmax():
    """Chi-square of 20,000 draws from five ids, at a temperature; and the same seed and step give the same draw."""
    logits, temperature = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5]), 1.5
    seeds = list(range(20_000))
    ids = drawn(logits.expand(20_000, -1), temperature, seeds, [3] * 20_000)
    assert torch.equal(ids[:50], drawn(logits.expand(50, -1), temperature, seeds[:50], [3] * 50))
    expected = (logits / temperature).softmax(-1) * 20_000
    counts = torch.bincount(ids, minlength=5)
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5  # 0.1 % of a chi-square with 4 degrees of freedom


@pytest.mark.parametrize("architecture", ["falcon_h1", "lfm2"])
def test_models_that_remember_more_than_keys_and_values(tmp_path, architecture):
    """Hybrids of attention and recurrence: nothing is shared and no row left out, and the numbers are those of alone."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, eos_token_id=2, pad_token_id=0, **HYBRIDS[architecture],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    engine = TransformersEngine(EngineSpec(tmp_path, "float32", 300, 64, (2,), "cpu", batch_size=4))
    prefix = list(range(10, 40))
    asked = [Request(n, [*prefix, 50 + n, 60][n % 3 :], given_ids=[70, 71, 72][: 1 + n % 3]) for n in range(4)]
    ask = Ask(TOP_K, 3)
    for request, scored in zip(asked, engine.score_all(asked, ask), strict=True):
        [alone] = engine.score_all([request], ask)
        assert scored.response_ids.tolist() == list(request.given_ids)
        assert np.array_equal(scored.topk_ids_PK, alone.topk_ids_PK)
        assert np.abs(scored.topk_logits_PK - alone.topk_logits_PK).max() < 1e-4
    assert engine.usage.cached_tokens == 0


def test_no_row_loses_its_beginning_to_the_padding_of_a_sliding_window():
    """Long prompts with short responses beside short ones with long: each fits in the window, padded to both they do not."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral", vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=64, initializer_range=0.3,
    )  # fmt: skip
    spec = EngineSpec(LAB_SMALL, "float32", 100, 128, (0,), "cpu")
    engine = TransformersEngine(spec, AutoModelForCausalLM.from_config(config).eval())
    ids = np.random.default_rng(0).integers(1, 100, 100).tolist()
    lengths = [(35, 3), (2, 36)] * 6
    asked = [
        Request(n, [*ids[:20], *ids[20 + n :][:own]], given_ids=ids[30 + n :][:new])
        for n, (own, new) in enumerate(lengths)
    ]
    ask = Ask(100, 40)
    for request, scored in zip(asked, engine.score_all(asked, ask), strict=True):
        [alone] = engine.score_all([request], ask)
        assert np.abs(scored.topk_logits_PK - alone.topk_logits_PK).max() < 1e-3
    assert engine.usage.cached_tokens > 0


def test_no_batch_has_more_rows_than_asked_for(spec):
    engine = TransformersEngine(replace(spec, batch_size=4))
    prompts = [[5] * 20 + [6 + n] for n in range(30)] + [[5] * 20 + list(range(6, 106))]
    batches = list(engine._batches(prompts, 1))
    assert max(len(batch.rows) for batch in batches) == 4
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(31))


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 200), st.integers(0, 2**31))
def test_the_largest_of_a_large_vocabulary_are_found_exactly(k, rows, padding, seed):
    """By blocks, with a part of a block at the end, ties, and padding that is larger than everything."""
    generator = torch.Generator().manual_seed(seed)
    width = LARGE_VOCABULARY + 17
    logits = torch.randn(rows + 1, width + padding, generator=generator).mul(8).round() / 4
    logits[:, width:] = 100
    ids, values, sums = top_k(logits, k, width, logsumexp=True)
    assert torch.equal(values, logits[:, :width].topk(k).values)
    assert torch.equal(logits.gather(1, ids.long()), values)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert torch.equal(sums, logits.logsumexp(-1))


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
    self_test(engine, requests(prompts), Ask(TOP_K, 1, logsumexp=True), spec.num_ids, "small")


class Wrong:
    """The real engine with one fault in what it returns."""

    def __init__(self, engine, fault):
        self.name, self.dtype, self._engine, self._fault, self._calls = "wrong 1.0", engine.dtype, engine, fault, 0

    def score_all(self, requests, ask):
        self._calls += 1
        return [self._fault(s, self._calls) for s in self._engine.score_all(requests, ask)]


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


def wrong_logsumexp(s: Scored, call: int) -> Scored:
    return replace(s, logsumexp_P=s.logsumexp_P - 0.1)


def another_response(s: Scored, call: int) -> Scored:
    return replace(s, response_ids=s.response_ids + 1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (log_probabilities, "log-probabilities, not raw logits"),
        (rows_shifted_by_one, "shifted|after a longer prompt"),
        (stale_prefix_cache, "prefix cache"),
        (wrong_continuation, "after a longer prompt"),
        (padding_ids, "padding of the head"),
        (wrong_logsumexp, "its log-sum-exp is"),
        (another_response, "came back as"),
    ],
)
def test_the_self_test_fails_loudly(engine, prompts, spec, fault, message):
    ask = Ask(TOP_K, 1, logsumexp=True)
    asked = requests(prompts, given_ids=[7, 900] if fault is another_response else None)
    self_test(engine, asked, ask, spec.num_ids, "small")
    with pytest.raises(UserError, match=message) as caught:
        self_test(Wrong(engine, fault), asked, ask, spec.num_ids, "small")
    assert "wrong 1.0" in caught.value.what


def test_vllm_where_it_is_not_installed(spec, monkeypatch):
    monkeypatch.setattr("duet.stages.engines.choose.vllm_fault", lambda: "the package vllm is not installed")
    engine, reason = open_engine(spec, "auto")
    assert engine.name.startswith("transformers")
    assert "not installed" in reason
    with pytest.raises(UserError, match="not installed"):
        open_engine(spec, "vllm")


@pytest.mark.parametrize(
    ("dtype", "factor", "hint"), [("float16", 2e4, "bfloat16 or float32"), ("float32", float("nan"), "damaged")]
)
def test_a_model_whose_logits_are_not_finite_is_named_as_such(tmp_path, spec, prompts, dtype, factor, hint):
    """float16 overflows in the head; a weight that is NaN is one in any dtype."""
    model = load_model(LAB_SMALL, "float32")
    with torch.no_grad():
        model.model.norm.weight *= factor
    model.save_pretrained(tmp_path / "broken")
    engine = TransformersEngine(replace(spec, model_dir=tmp_path / "broken", dtype=dtype))
    with pytest.raises(UserError, match="the model broken-7b gives logits that are not finite") as found:
        self_test(engine, requests(prompts), Ask(TOP_K, 1), spec.num_ids, "broken-7b")
    assert hint in found.value.hint
