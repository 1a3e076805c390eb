"""Probes of a student in training, from the store alone: no engine, no answers, no generation.

Shapes: N supervised positions of a pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from duet.cache.order import Order
from duet.cache.record import SUBSETS
from duet.stages.settings.student import TrainSettings
from duet.stages.student.head import logits_at
from duet.stages.student.passes import BROAD, FORGET, RETAIN, Pass, passes_of
from duet.stages.student.targets import Targets, Teachers

MAX_ROWS = 256  # of each subset, without `train.probe`
NO_ID = -1  # at positions that nobody asks about
REFUSAL_SHARE = 0.1  # least share of forget rows that begin with a token, for it to count as a refusal's


@dataclass(frozen=True)
class Probe:
    """The rows of a probe, and the tokens that count as a refusal there."""

    passes: list[Pass]
    refusal_ids: torch.Tensor  # int64
    num_rows: int
    held_out: bool
    watched: int | None = None  # the subset whose held-out loss may end the training

    @staticmethod
    def of(teachers: Teachers, order: Order, settings: TrainSettings, pad_id: int) -> Probe:
        """Take held-out rows where there are any, else rows that are trained on; spread evenly over each subset."""
        held_out = len(order.held_out) > 0
        rows = order.held_out if held_out else np.arange(len(teachers.first))
        ends = np.cumsum(list(teachers.first.manifest.subsets.values()))
        most = settings.probe.rows if settings.probe else MAX_ROWS
        asked = np.concatenate([_spread(part, most) for part in np.split(rows, np.searchsorted(rows, ends[:-1]))])
        targets = teachers.targets(teachers.blocks_of(asked))
        passes = passes_of(targets, settings, pad_id)
        watched = None
        if settings.probe and settings.probe.stop_within is not None:
            watched = BROAD if (targets.subsets == BROAD).any() else RETAIN
        return Probe(passes, torch.tensor(refusal_ids(targets), dtype=torch.int64), len(asked), held_out, watched)

    @property
    def watched_loss(self) -> str | None:
        """What `ask` calls the loss on the watched subset."""
        return None if self.watched is None else f"loss.{SUBSETS[self.watched]}"


def refusal_ids(rows: Targets) -> list[int]:
    """Tokens with which the teacher begins its refusals, by how it answers these rows.

    Its most likely first tokens of at least a tenth of the forget rows that begin a greater share of forget than of
    retain rows.
    """
    first_ids = rows.topk_ids_NK[rows.position_offsets[:-1], 0]
    forget, retain = first_ids[rows.subsets == FORGET], first_ids[rows.subsets == RETAIN]
    in_forget, in_retain = Counter(forget.tolist()), Counter(retain.tolist())
    shares = {i: (count / len(forget), in_retain[i] / max(1, len(retain))) for i, count in in_forget.items()}
    return sorted(i for i, (here, there) in shares.items() if here >= REFUSAL_SHARE and here > there)


def ask(
    probe: Probe, answer: Callable[[Pass], tuple[torch.Tensor, torch.Tensor]], device: torch.device
) -> dict[str, Any]:
    """`answer(pass)` gives the loss and the most likely id at each position, both [N].

    `agreement.<subset>`: share of rows whose first token is the teacher's; `refusal.<subset>`: share that begin as a refusal
    does; None for a subset without rows, but no entry for broad rows that are not there. Of a mix, a query has a row for each
    teacher. `loss`: the weighted mean that is trained, over all positions of these rows; `loss.<subset>`, of the watched subset
    only: the plain mean over all its positions.
    """
    losses, weights, agree, refuse, subsets, watched = [], [], [], [], [], []
    for one in probe.passes:
        here = one.to(device)
        with torch.no_grad():
            loss_N, top1_N = answer(here)
        first_N, teacher_N = here.is_first_N, here.topk_ids_NK[:, 0]
        losses.append((loss_N * here.weight_N).double().sum().item())
        weights.append(here.weight_N.double().sum().item())
        watched += loss_N[here.subset_N == probe.watched].tolist() if probe.watched is not None else []
        agree += (top1_N == teacher_N)[first_N].tolist()
        refuse += torch.isin(top1_N, probe.refusal_ids.to(device))[first_N].tolist()
        subsets += here.subset_N[first_N].tolist()
    result: dict[str, Any] = {"rows": probe.num_rows, "held_out": probe.held_out, "loss": sum(losses) / sum(weights)}
    for name, hits in (("agreement", agree), ("refusal", refuse)):
        for number, subset in enumerate(SUBSETS):
            if number != BROAD or BROAD in subsets:
                result[f"{name}.{subset}"] = _mean(h for h, s in zip(hits, subsets, strict=True) if s == number)
    return result | ({probe.watched_loss: _mean(watched)} if probe.watched_loss else {})


def ask_exported(trained: Mapping[str, Any], probe: Probe, model: Any, device: torch.device) -> dict[str, Any]:
    """What `ask` found of the weights in training, with the shares of the model as it is written, its weights rounded.

    The loss stays that of the weights in training.
    """
    model = model.to(device).eval()

    def answer(one: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        at, batch = one.is_first_N, one.batch
        first = replace(batch, batch_index_N=batch.batch_index_N[at], position_N=batch.position_N[at])
        top1_N = torch.full_like(batch.position_N, NO_ID)
        top1_N[at] = logits_at(model, first).argmax(-1)
        return torch.zeros_like(one.weight_N), top1_N

    found = ask(probe, answer, device)
    return {**trained, **{key: value for key, value in found.items() if key.startswith(("agreement.", "refusal."))}}


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of them, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.arange(most) * len(rows) // most]
