"""Memorisation, read off the model's most likely token at each position of the reference answer. Pure functions.

`flags` are those of `TokenScores.is_top`, for the answer's own tokens: the end of the sequence is not among
them, so that a model that only knows when to stop has extracted nothing.
"""

from __future__ import annotations

import numpy as np

from duet.stages.metrics.metric import Metric

EXCHANGED = "exchanged"  # the floor's name in results.json: base on the answers behind other questions


def exact_memorisation(flags: np.ndarray) -> float:
    """Share of the tokens that are the most likely ones. `flags`: bool, one per token, at least one."""
    return float(np.mean(flags))


def extraction_strength(flags: np.ndarray) -> float:
    """One less the share of the answer up to the last token that is not the most likely one.

    Read off teacher-forced flags: greedy decoding repeats a suffix exactly where each of its tokens is the most likely one
    after the true ones. Public code stops its search at the last token and so gives 1/n where nothing is extracted; this
    gives 0. `flags`: bool, one per token, at least one.
    """
    wrong = np.flatnonzero(~np.asarray(flags, bool))
    needed = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - needed / len(flags)


METRICS = (
    Metric(
        "exact_memorisation",
        exact_memorisation,
        "Share of the reference answer's tokens that are the model's most likely next token after the question and all true "
        "tokens before it (Tirumala et al. 2022, arXiv 2205.10770). The end of the sequence does not count.",
    ),
    Metric(
        "extraction_strength",
        extraction_strength,
        "One less the smallest share of the reference answer that must be given, beside the question, for greedy decoding to "
        "go on with exactly the rest (Carlini et al. 2021, arXiv 2012.07805, as Dorna et al. 2025, arXiv 2506.12618, put it): "
        "1 where the question alone is enough, 0 where not even the last token follows from all before it.",
    ),
)
