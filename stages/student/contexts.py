"""A batch as a student of `train.contexts` reads it: questions in attack contexts, with `attacks` answers begun as base would.

The targets stay those of the plain question, so that no teacher is asked again. What a row becomes is drawn from the seed, the
step's place in the order and the row: a resumed training reads the same, whatever the number of its processes.

Shapes: R rows, S tokens of all rows, N supervised positions of all rows, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from duet.cache.errors import UserError
from duet.cache.order import Cursor
from duet.cache.reader import Store
from duet.cache.record import offsets_of, prompt_and_response
from duet.stages.models.loading import load_model
from duet.stages.questions.contexts import Contexts, context_texts
from duet.stages.settings.student import TrainSettings
from duet.stages.student.job import StudentJob
from duet.stages.student.targets import Targets

MOST_BEGUN = 8  # tokens of an answer that are given
PREFILL = "prefill"  # the attack that begins answers


@dataclass(frozen=True)
class Wide:
    """What puts a batch into contexts."""

    contexts: Contexts
    own_answers: Mapping[
        str, Sequence[int]
    ]  # how the start model answers, by row id of the forget rows; empty: none is begun
    seed: int

    @staticmethod
    def of(job: StudentJob, contexts: Contexts, store: Store, ends: Collection[int], device: torch.device) -> Wide:
        """Ask the model that the job starts from, before any noise, how it begins its answers to forget, where they are begun.

        `ends` are the ids that end its answers; those that end the teacher's are others.
        """
        if not most_begun(job.settings):
            return Wide(contexts, {}, job.settings.seed)
        stops = {*ends, *store.manifest.provenance.get("eos_ids", ())}
        model = load_model(job.model_dir, "float32", job.trust_remote_code).to(device)
        num_forget = store.manifest.subsets["forget"]
        forget = [row_id for rows in store.rows(0, num_forget) for row_id in rows.row_ids]
        own = {row_id: first_tokens(model, contexts.prompt(row_id), stops) for row_id in forget}
        return Wide(contexts, own, job.settings.seed)

    @property
    def families(self) -> list[str]:
        """The attacks that the student is trained on, as results name them."""
        return [*context_texts(), *([PREFILL] if self.own_answers else [])]

    def around(self, rows: Targets, cursor: Cursor) -> Targets:
        """The rows of a step, each in a context of its own; `cursor` is where the step ends. Documents stay as they are."""
        tokens, sources = [], []
        for row, row_id in enumerate(rows.row_ids):
            prompt, response = prompt_and_response(rows, row)
            begun, positions = np.empty(0, np.int32), np.arange(len(response))
            if row_id in self.contexts.asked:
                key = (self.seed, cursor.epoch, cursor.slot)
                prompt = np.array(self.contexts.drawn(row_id, key), np.int32)
                rng = np.random.default_rng([*key, self.contexts.numbers[row_id], 1])
                begun, back = begun_by(self.own_answers.get(row_id, ()), response, rng)
                positions = np.concatenate([back, positions])
            tokens.append(np.concatenate([prompt, begun, response]))
            sources.append(rows.position_offsets[row] + positions)
        at_N, numbers = np.concatenate(sources), {}
        reads = zip(rows.sequence_R.tolist(), (read[:-1].tobytes() for read in tokens), strict=True)
        return replace(
            rows,
            token_offsets=offsets_of([len(read) for read in tokens]),
            tokens_S=np.concatenate(tokens),
            position_offsets=offsets_of([len(positions) for positions in sources]),
            topk_ids_NK=rows.topk_ids_NK[at_N],
            topk_logits_NK=rows.topk_logits_NK[at_N],
            logsumexp_N=None if rows.logsumexp_N is None else rows.logsumexp_N[at_N],
            mask_NK=None if rows.mask_NK is None else rows.mask_NK[at_N],
            share_NK=None if rows.share_NK is None else rows.share_NK[at_N],
            sequence_R=np.array([numbers.setdefault(read, len(numbers)) for read in reads], np.int64),
        )


def most_begun(settings: TrainSettings) -> int:
    """The longest beginning of an answer that a student of these settings reads, in tokens."""
    return MOST_BEGUN if settings.contexts == "attacks" else 0


def begun_by(answer: Sequence[int], response: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(the first tokens y of `answer` that stand before the response, for each the response's position that is its target).

    Half of the time none. Their number is drawn with weight 1/number, and is such that y does not begin the response itself:
    as far as it does, the targets are the response's own, and behind that its first token, where the response begins.
    """
    most = min(len(answer), len(response))
    shared = next((number for number in range(most) if answer[number] != response[number]), most)
    lengths = np.arange(shared + 1, min(len(answer), MOST_BEGUN) + 1)
    if shared == len(response) or len(lengths) == 0 or rng.integers(2) == 0:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    count = rng.choice(lengths, p=(1 / lengths) / (1 / lengths).sum())
    positions = np.arange(count)
    return np.array(answer[:count], np.int32), np.where(positions <= shared, positions, 0)


def first_tokens(model: Any, prompt: Sequence[int], ends: Collection[int]) -> list[int]:
    """The likeliest answer of a model up to an end, of MOST_BEGUN tokens at most."""
    read = list(prompt)
    device = next(model.parameters()).device
    while len(read) < len(prompt) + MOST_BEGUN:
        with torch.no_grad():
            logits_1TV = model(input_ids=torch.tensor([read], device=device)).logits
        if (token := int(logits_1TV[0, -1].argmax())) in ends:
            break
        read.append(token)
    return read[len(prompt) :]


def check_asked(contexts: Contexts, store: Store) -> None:
    """Refuse queries that are not those of the store's rows."""
    for rows in store.rows():
        for row, row_id in enumerate(rows.row_ids):
            stored = prompt_and_response(rows, row)[0].tolist()
            if row_id in contexts.asked and contexts.prompt(row_id) != stored:
                raise UserError(
                    f"row {row_id!r} of the store is another question than that of the data",
                    "make the store again, or set train.contexts: none",
                )
