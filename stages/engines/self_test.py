"""The self-test that an engine must pass before its numbers are believed: raw, finite, and the same alone as in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from duet.cache.errors import UserError
from duet.stages.engines.interface import Ask, Engine, Request, Scored

# Largest difference of a logit between two passes over the same tokens that only rounding explains, by dtype.
# Assumption for the 16-bit types: a few units in the last place of logits around 30.
ROUNDING = {"float32": 2e-3, "float16": 0.25, "bfloat16": 1.0}


@dataclass(frozen=True)
class _Passes:
    """The responses of an engine to one request."""

    first: Scored
    again: Scored
    continued: Scored  # to the prompt with the first response token behind it


def _refuse_not_finite(scored: Scored, dtype: str, model: str) -> None:
    wrong = scored.topk_logits_PK[~np.isfinite(scored.topk_logits_PK)]
    if len(wrong) == 0:
        return
    way = (
        "float16 overflows above 65504: set dtype to bfloat16 or float32"
        if dtype == "float16"
        else "its weights are damaged, or overflow in this dtype: look for NaN in them, or set dtype: float32"
    )
    raise UserError(f"the model {model} gives logits that are not finite ({wrong[0]}) in {dtype}", way)


def self_test(engine: Engine, requests: Sequence[Request], ask: Ask, num_ids: int, model: str) -> None:
    """Prove on real prompts that the engine returns raw, aligned logits of real ids; UserError if it does not.

    Finite: every kept logit is a number; if not, `model` is at fault and not the engine.
    Raw: over all ids, log-probabilities have log-sum-exp 0 and raw logits do not; and the log-sum-exp that it returns is
    that of the logits. Aligned: a greedy token is the first id of its row, a given response comes back as it was given,
    and feeding response token r_0 as part of the prompt gives row 0 the logits that row 1 had. Repeatable: the second pass,
    now from the engine's prefix cache, gives the same. Real: no id is head padding.
    """
    ask = replace(ask, max_positions=2, ids="top_k")  # raw logits are what is tested
    first, again = engine.score_all(requests, ask), engine.score_all(requests, ask)
    longer = [Request(r.key, [*r.prompt_ids, int(s.response_ids[0])]) for r, s in zip(requests, first, strict=True)]
    continued = engine.score_all(longer, replace(ask, max_positions=1, temperature=None))
    everything = engine.score_all([Request(0, requests[0].prompt_ids)], Ask(num_ids, 1, logsumexp=ask.logsumexp))[0]
    for scored in (*first, *again, *continued):
        _refuse_not_finite(scored, engine.dtype, model)
    rows = zip(requests, map(_Passes, first, again, continued), strict=True)
    fault = (
        _raw_fault(everything, num_ids)
        or next(filter(None, (_row_fault(engine, ask, request, passes, num_ids) for request, passes in rows)), None)
        or _alone_fault(engine, first[0], everything, ask.top_k)
    )
    if fault:
        raise UserError(
            f"the engine {engine.name} failed its self-test: {fault}",
            "use another release of it, or set teacher.engine: transformers",
        )


def _raw_fault(everything: Scored, num_ids: int) -> str | None:
    if everything.topk_ids_PK.shape[1] != num_ids:
        return f"asked for all {num_ids} ids, it returned {everything.topk_ids_PK.shape[1]}"
    logits = everything.topk_logits_PK[0].astype(np.float64)
    logsumexp = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    if abs(logsumexp) < 1e-3:
        return "it returns log-probabilities, not raw logits (their log-sum-exp is 0)"
    # Rows of head padding count in the model's softmax and are not among the ids, so it may be larger.
    if everything.logsumexp_P is not None and everything.logsumexp_P[0] < logsumexp - 1e-3:
        return f"its log-sum-exp is {everything.logsumexp_P[0]:.6g}, that of its logits {logsumexp:.6g}"
    return None


def _alone_fault(engine: Engine, together: Scored, alone: Scored, top_k: int) -> str | None:
    difference = float(np.abs(together.topk_logits_PK[0] - alone.topk_logits_PK[0, :top_k]).max())
    if difference > ROUNDING[engine.dtype]:
        return f"a prompt has other logits among others than alone (by {difference:.3g})"
    return None


def _row_fault(engine: Engine, ask: Ask, request: Request, passes: _Passes, num_ids: int) -> str | None:
    tolerance = ROUNDING[engine.dtype]
    first, again, continued = passes.first, passes.again, passes.continued
    given = request.given_ids
    if given is not None and first.response_ids.tolist() != list(given):
        return f"the given response {list(given)} came back as {first.response_ids.tolist()}"
    for scored in (first, again, continued):
        if scored.topk_ids_PK.max() >= num_ids:
            return f"id {scored.topk_ids_PK.max()} is padding of the head, the tokenizer has {num_ids} ids"
    greedy = (continued,) if given is not None or ask.temperature else (first, again, continued)
    for scored in greedy:
        is_first = (scored.topk_ids_PK == scored.response_ids[:, None]) & (
            scored.topk_logits_PK >= scored.topk_logits_PK[:, :1] - tolerance
        )
        if not is_first.any(axis=1).all():
            return "a response token is not the most likely id of its row: rows and tokens are shifted"
    if (difference := _difference(first, 0, again, 0)) > tolerance:
        return f"the same prompt gave other logits the second time (by {difference:.3g}): its prefix cache is at fault"
    if len(first.response_ids) > 1 and (difference := _difference(first, 1, continued, 0)) > tolerance:
        return f"position 1 and the same position as the first after a longer prompt differ by {difference:.3g}"
    return None


def _difference(a: Scored, row_a: int, b: Scored, row_b: int) -> float:
    """Largest difference of the sorted logits of two rows: sorted values are stable where near-equal ids swap."""
    return float(np.abs(a.topk_logits_PK[row_a] - b.topk_logits_PK[row_b]).max())
