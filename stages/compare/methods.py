"""The unlearning methods that DUET is compared with, and the loss of each in a step: `METHODS`.

A method's loss is the sum of a term on the forget rows and, where it has one, a term on the retain rows. The terms bring a
model's numbers at answer tokens to the formulas of `losses.py`; `train.py` takes the steps. RepSelect takes none:
`repselect.py`.

Shapes: B rows, N answer tokens of all rows together, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import one_hot

from duet.cache.errors import UserError
from duet.stages.compare import losses
from duet.stages.compare.rows import Batch, QuestionAnswer
from duet.stages.models.alignment import AlignedBatch, align
from duet.stages.models.layers import decoder_layers
from duet.stages.models.sizes import meta_model
from duet.stages.settings.compare import CONSTANTS
from duet.stages.student.head import logits_at

# Constants of the papers that are not tried out here; the one that is tried out stands in METHODS.
NPO_BETA, DPO_BETA = 0.1, 0.1  # arXiv 2404.05868
SIMNPO_GAMMA = 0.0  # the margin of arXiv 2410.07163's own best settings
AP_BETA = 0.1  # arXiv 2410.08109
JENSUN_FIRST, JENSUN_FORGET = 0.5, 0.33  # weights of an answer's first token and of the forget loss (arXiv 2607.09236)
JENSUN_EPSILON = 1e-5  # below it a loss or a gradient counts as none (its public code)
RMU_ALPHA = 1.0  # weight of RMU's retain term; Duet's own, as the paper's 1200 is for directions of another length
RMU_DEPTH = 7 / 32  # the paper's layer 7 of 32


@dataclass(frozen=True)
class Answered:
    """A model's logits at the answer tokens of some rows, and nowhere else."""

    logits_NV: torch.Tensor  # float32
    ids_N: torch.Tensor  # int64, the answer tokens
    row_N: torch.Tensor  # int64, whose they are
    num_rows: int

    @property
    def logprob_N(self) -> torch.Tensor:
        return losses.token_logprobs(self.logits_NV, self.ids_N)

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each answer's log-probability and number of tokens, [B] each."""
        return losses.per_row(self.logprob_N, self.row_N, self.num_rows)

    def mean_probability_B(self) -> torch.Tensor:
        """Of each answer, the mean over its tokens of their probability."""
        sums_B, lengths_B = losses.per_row(self.logprob_N.exp(), self.row_N, self.num_rows)
        return sums_B / lengths_B


class Models:
    """The model in training and, for the methods that need it, the frozen one that it began as."""

    def __init__(self, model: Any, reference: Any, pad_id: int, device: torch.device, seed: int) -> None:
        self.model, self._reference, self._pad_id, self._device = model, reference, pad_id, device
        self._draw = torch.Generator().manual_seed(seed)
        self._direction_D: torch.Tensor | None = None

    def __call__(self, rows: Sequence[QuestionAnswer]) -> Answered:
        return self._answered(self.model, rows)

    def reference(self, rows: Sequence[QuestionAnswer]) -> Answered:
        with torch.no_grad():
            return self._answered(self._reference, rows)

    def hidden(self, rows: Sequence[QuestionAnswer]) -> torch.Tensor:
        """The output of RMU's layer at the positions that predict answer tokens, [N, D]."""
        return self._hidden(self.model, rows)

    def reference_hidden(self, rows: Sequence[QuestionAnswer]) -> torch.Tensor:
        with torch.no_grad():
            return self._hidden(self._reference, rows)

    def direction(self, width: int) -> torch.Tensor:
        """RMU's random unit vector, [D], drawn once: independent uniform entries, normalised."""
        if self._direction_D is None:
            drawn_D = torch.rand(width, generator=self._draw)
            self._direction_D = (drawn_D / drawn_D.norm()).to(self._device)
        return self._direction_D

    def _answered(self, model: Any, rows: Sequence[QuestionAnswer]) -> Answered:
        batch = self._aligned(rows)
        ids_N = torch.tensor([token for row in rows for token in row.answer_ids], device=self._device)
        return Answered(logits_at(model, batch).float(), ids_N, batch.batch_index_N, len(rows))

    def _hidden(self, model: Any, rows: Sequence[QuestionAnswer]) -> torch.Tensor:
        batch, kept = self._aligned(rows), []
        layer = decoder_layers(model)[rmu_layer(model)]

        def keep(_: Any, __: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        handle = layer.register_forward_hook(keep)
        try:
            logits_at(model, batch)
        finally:
            handle.remove()
        return kept[0][batch.batch_index_N, batch.position_N].float()

    def _aligned(self, rows: Sequence[QuestionAnswer]) -> AlignedBatch:
        return align([r.prompt_ids for r in rows], [r.answer_ids for r in rows], self._pad_id).to(self._device)


Term = Callable[[Models, Batch, float], torch.Tensor]


def rmu_layer(model: Any) -> int:
    """The layer, from 0, whose output RMU changes: as deep as the paper's, and at least the second of two or more."""
    count = len(decoder_layers(model))
    return min(max(1, round(RMU_DEPTH * count)), count - 1)


def retain_nll(models: Models, batch: Batch, _: float) -> torch.Tensor:
    return losses.nll(models(batch.retain).logprob_N)


def _ga(models: Models, batch: Batch, _: float) -> torch.Tensor:
    return losses.gradient_ascent(models(batch.forget).logprob_N)


def _npo(models: Models, batch: Batch, _: float) -> torch.Tensor:
    return losses.npo(models(batch.forget).sums()[0], models.reference(batch.forget).sums()[0], NPO_BETA)


def _simnpo(models: Models, batch: Batch, beta: float) -> torch.Tensor:
    return losses.simnpo(*models(batch.forget).sums(), beta, SIMNPO_GAMMA)


def _refusal(models: Models, batch: Batch, _: float) -> torch.Tensor:
    return losses.nll(models(batch.refused).logprob_N)


def _dpo(models: Models, batch: Batch, _: float) -> torch.Tensor:
    sides = [ask(rows).sums()[0] for rows in (batch.refused, batch.forget) for ask in (models, models.reference)]
    return losses.dpo(*sides, beta=DPO_BETA)


def _preservation(models: Models, batch: Batch, _: float) -> torch.Tensor:
    return losses.answer_preservation(models(batch.retain).sums()[0], models(batch.retain_refused).sums()[0], AP_BETA)


def _jensun(models: Models, batch: Batch, _: float) -> torch.Tensor:
    """JENSUN_FORGET s L_f + L_r, s = |dL_r/dlogits| / |dL_f/dlogits| where neither loss nor gradient is 0 (arXiv 2607.09236).

    The gradients' norms are taken at the logits, as in its public code, and s is a constant of the step.
    """
    forget = _jensun_forget(models, batch.refused_in_context) if batch.refused_in_context else None
    retain = _jensun_retain(models, batch.retain_in_context) if batch.retain_in_context else None
    if forget is None or retain is None:
        found = [JENSUN_FORGET * forget[0]] if forget else [retain[0]] if retain else []
        return torch.stack(found).sum()
    scale = 1.0
    if min(loss.item() for loss, _ in (forget, retain)) > JENSUN_EPSILON:
        of_forget, of_retain = (
            torch.autograd.grad(loss, logits_NV, retain_graph=True)[0].norm().item()
            for loss, logits_NV in (forget, retain)
        )
        scale = of_retain / (of_forget + JENSUN_EPSILON)
    return JENSUN_FORGET * scale * forget[0] + retain[0]


def _jensun_forget(models: Models, rows: Sequence[QuestionAnswer]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss towards the refusal, at each token of a begun answer towards its first token; and the logits, [N, V]."""
    now = models(rows)
    wanted = [[row.answer_ids[row.begun]] * row.begun + list(row.answer_ids[row.begun :]) for row in rows]
    ids_N = torch.tensor([token for ids in wanted for token in ids], device=now.ids_N.device)
    target_NV = one_hot(ids_N, now.logits_NV.shape[1]).to(now.logits_NV.dtype)
    distance_N = losses.jensen_shannon(now.logits_NV, target_NV)
    return losses.first_weighted(distance_N, now.row_N, now.num_rows, JENSUN_FIRST), now.logits_NV


def _jensun_retain(models: Models, rows: Sequence[QuestionAnswer]) -> tuple[torch.Tensor, torch.Tensor]:
    """The distance from the frozen model at the answer's tokens; and the logits, [N, V]."""
    now = models(rows)
    distance_N = losses.jensen_shannon(now.logits_NV, models.reference(rows).logits_NV.softmax(-1))
    return losses.first_weighted(distance_N, now.row_N, now.num_rows, JENSUN_FIRST), now.logits_NV


def _rmu_forget(models: Models, batch: Batch, steering: float) -> torch.Tensor:
    hidden_ND = models.hidden(batch.forget)
    size = models.reference_hidden(batch.forget).norm(dim=-1).mean()
    return losses.rmu_forget(hidden_ND, steering * size * models.direction(hidden_ND.shape[1]))


def _rmu_retain(models: Models, batch: Batch, _: float) -> torch.Tensor:
    return RMU_ALPHA * losses.rmu_retain(models.hidden(batch.retain), models.reference_hidden(batch.retain))


def _undial(models: Models, batch: Batch, gamma: float) -> torch.Tensor:
    now = models(batch.forget)
    return losses.undial(now.logits_NV, models.reference(batch.forget).logits_NV, now.ids_N, gamma)


def _flat(models: Models, batch: Batch, _: float) -> torch.Tensor:
    return losses.flat(models(batch.refused).mean_probability_B(), models(batch.forget).mean_probability_B(), "kl")


@dataclass(frozen=True)
class Method:
    """One method: its loss is the sum of a term on the forget rows and, where it has one, a term on the retain rows."""

    title: str
    paper: str  # arXiv id
    forget: Term
    retain: Term | None = None
    reference: bool = False  # needs the frozen model
    constant: str | None = None  # the name of the constant that is tried out beside the learning rate
    constants: tuple[float, ...] = ()  # values to try
    layers_only: bool = False  # trains RMU's layers only
    joint: Term | None = None  # one loss of both kinds of rows in the place of the two terms
    in_context: bool = False  # wants rows in context
    smooth: bool = False  # takes the forget gradient where the forget loss is worst within the constant, SAM

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The attacks of whose kinds of text it is trained on others: rows in context hold begun answers too."""
        return ("in_context", "prefill") if self.in_context else ()


METHODS: dict[str, Method] = {
    "ga": Method("gradient ascent", "2401.06121", _ga),
    "grad_diff": Method("GradDiff", "2401.06121", _ga, retain_nll),
    "npo": Method("NPO", "2404.05868", _npo, retain_nll, reference=True),
    "simnpo": Method("SimNPO", "2410.07163", _simnpo, retain_nll, constant=CONSTANTS["simnpo"], constants=(2.5,)),
    "refusal": Method("refusal training", "2401.06121", _refusal, retain_nll),
    "dpo": Method("DPO-IDK", "2305.18290", _dpo, retain_nll, reference=True),
    "rmu": Method(
        "RMU",
        "2403.03218",
        _rmu_forget,
        _rmu_retain,
        reference=True,
        constant=CONSTANTS["rmu"],
        constants=(1.0, 2.0),
        layers_only=True,
    ),
    "undial": Method(
        "UNDIAL", "2402.10052", _undial, reference=True, constant=CONSTANTS["undial"], constants=(3.0, 10.0)
    ),
    "flat": Method("FLAT", "2410.11143", _flat),
    "idk_ap": Method("IDK+AP", "2410.08109", _refusal, _preservation),
    "npo_sam": Method(
        "NPO+SAM",
        "2502.05374",
        _npo,
        retain_nll,
        reference=True,
        constant=CONSTANTS["npo_sam"],
        constants=(0.01, 0.1),
        smooth=True,
    ),
    "jensun": Method("JensUn++", "2607.09236", _refusal, reference=True, joint=_jensun, in_context=True),
    "repselect": Method(
        "RepSelect",
        "2606.17168",
        _ga,
        reference=True,
        constant=CONSTANTS["repselect"],
        constants=(0.01, 0.1, 1.0),
    ),
}


def loss_of(method: Method, models: Models, batch: Batch, constant: float) -> torch.Tensor | None:
    """The method's loss on a step's rows, each term where there are rows for it; None where the step has none at all."""
    if method.joint is not None:
        return method.joint(models, batch, constant) if batch.forget or batch.retain else None
    terms = [(method.forget, batch.forget), (method.retain, batch.retain)]
    found = [term(models, batch, constant) for term, rows in terms if term is not None and rows]
    return torch.stack(found).sum() if found else None


def check_rmus_layers(model_dir: Path, last_layers: int | None, trust_remote_code: bool) -> None:
    """Refuse, before any weights are read, to train only layers that come after all of RMU's."""
    model = meta_model(model_dir, trust_remote_code)
    last, count = rmu_layer(model), len(decoder_layers(model))
    if last_layers is not None and last < count - last_layers:
        raise UserError(
            f"train.last_layers: {last_layers} trains layers from {count - last_layers} on, and rmu none after layer {last}",
            "leave rmu out of compare.methods, or train more layers",
        )


def train_only_rmus_layers(model: Any) -> None:
    """RMU updates the layer whose output it changes and the two before it."""
    last = rmu_layer(model)
    inside = {id(p) for layer in list(decoder_layers(model))[max(0, last - 2) : last + 1] for p in layer.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in inside)
