"""Checks that stores, settings and the model that a student starts from fit together.

They run before stage one, as far as the facts are known then, and at the start of stage two. They read configs and tokenizers,
never weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.cache.manifest import Manifest
from duet.cache.plan import ids_kind, is_drawn
from duet.cache.reader import Store
from duet.cache.record import SUBSETS, prompt_and_response
from duet.stages.models.directory import check_trainable_start, load_config
from duet.stages.models.limits import check_ids_within, check_length, context_length, vocab_width
from duet.stages.models.tokenizers import eos_ids, load_tokenizer
from duet.stages.questions.contexts import Contexts
from duet.stages.questions.same_prompts import check_same_tokenizer
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.student import LOSS_OPTIONS, TrainSettings
from duet.stages.student.contexts import most_begun
from duet.stages.student.export import try_export
from duet.stages.student.losses import LOSSES
from duet.stages.student.ranks import Processes


@dataclass(frozen=True)
class Expected:
    """The known facts of a store that is not there yet; as in `Manifest`."""

    top_k: int
    logsumexp: bool
    rows: int
    positions: int  # at most
    subsets: dict[str, int]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """The model that a student starts from, without its weights."""

    student: str  # its name
    config: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    ids_of_one: set[int]  # added tokens that only this tokenizer or only the store's has
    left_out: tuple[str, ...]  # flags of generation_config.json that cannot be saved again

    @staticmethod
    def of(
        model_dir: Path,
        student: str,
        settings: TrainSettings,
        store_tokenizer: Any,
        prompt: PromptSettings,
        trust_remote_code: bool = False,
    ) -> Start:
        """UserError where a student cannot be trained or exported from here, or has another tokenizer than the store."""
        check_trainable_start(model_dir, f"student {student!r}")
        config = load_config(model_dir, trust_remote_code)
        tokenizer = load_tokenizer(model_dir, trust_remote_code)
        of_one = check_same_tokenizer(store_tokenizer, tokenizer, prompt, student)
        left_out = try_export(model_dir, settings, tokenizer, trust_remote_code)
        ends = tuple(eos_ids(model_dir, config, tokenizer))
        return Start(student, config, tokenizer, ends, of_one, tuple(left_out))

    @property
    def width(self) -> int:
        return vocab_width(self.config)

    def check_row(
        self, row_id: str, prompt_ids: Sequence[int], response_ids: Sequence[int], to_follow: int = 0
    ) -> None:
        """Refuse a row that the student could not read, or would read otherwise than the teacher."""
        who, ids = f"student {self.student!r}", [*prompt_ids, *response_ids]
        check_length(prompt_ids, len(response_ids) + to_follow, context_length(self.config), row_id, "student")
        check_ids_within(ids, self.width, row_id, who)
        if unknown := self.ids_of_one.intersection(ids):
            raise UserError(
                f"row {row_id!r} has the id {min(unknown)}, a token of one tokenizer only, of {who} or of the store",
                "take a student with the teacher's tokenizer, or keep that token out of questions and chat template",
            )

    def check_store(self, store: Store) -> None:
        """The same of every row of a store, its responses and top-k ids too. Reads it only where some row could fail."""
        manifest = store.manifest
        highest = max(manifest.vocab_size, *self.tokenizer.get_vocab().values())
        if manifest.longest <= context_length(self.config) and highest < self.width and not self.ids_of_one:
            return
        for rows in store.rows():
            for row, row_id in enumerate(rows.row_ids):
                prompt, response = prompt_and_response(rows, row)
                self.check_row(row_id, prompt.tolist(), response.tolist())
                kept_NK = rows.topk_ids_NK[rows.position_offsets[row] : rows.position_offsets[row + 1]]
                check_ids_within(kept_NK, self.width, row_id, f"student {self.student!r}")

    def check_contexts(self, contexts: Contexts, settings: TrainSettings, num_positions: int) -> None:
        """Refuse contexts that the prompts' form cannot take, and those that are longer than the student can read."""
        for row_id in contexts.asked:
            self.check_row(row_id, contexts.longest(row_id), (), most_begun(settings) + num_positions)

    def missing_ends(self, manifests: Sequence[Manifest]) -> list[int]:
        """Ids that end the teachers' responses, and not yet the student's: it learns them where a response is learned whole."""
        ends = {i for one in manifests if one.positions > one.rows for i in one.provenance.get("eos_ids", ())}
        return sorted(i for i in ends - set(self.eos_ids) if i < self.width)


def _check_weights(settings: TrainSettings, subsets: Mapping[str, int], key: str) -> None:
    """Refuse weights of subsets beside which there are no others in training, or of which there are no rows."""
    there = [subset for subset in SUBSETS if subsets.get(subset)]
    trained = [subset for subset in there if subset != "forget" or settings.forget_share != 0]
    for subset in SUBSETS:
        if getattr(settings, f"{subset}_weight") == 1:
            continue
        if len(there) == 1:
            raise UserError(
                f"{key}.{subset}_weight does nothing: the store has rows of one subset only", "leave it out"
            )
        if subset not in there:
            raise UserError(
                f"{key}.{subset}_weight does nothing: the store has no {subset} rows",
                f"leave it out, or name some in data.{subset}",
            )
        if len(trained) == 1:
            raise UserError(
                f"{key}.{subset}_weight does nothing with forget_share {settings.forget_share:g} and rows of two subsets",
                "leave it out",
            )


def _check_ids(loss: str, kind: str, settings: TrainSettings, combine: str | None, key: str) -> None:
    """Refuse what drawn ids cannot serve, and what only drawn ids can; and to leave out some of given ids."""
    drawn = kind == "sampled"
    if kind == "given" and settings.top_k:
        raise UserError(
            f"{key}.top_k would leave out some of the ids that the store was asked to keep (teacher.ids: given)",
            "leave it out",
        )
    if drawn != (loss != "auto" and LOSSES[loss].needs_draws):
        raise UserError(
            f"{key}.loss: {loss} is not for a store whose ids were {'drawn' if drawn else 'not drawn'} (teacher.ids)",
            "set train.loss: forward_kl_sampled or auto" if drawn else "take another loss, or set teacher.ids: sampled",
        )
    if drawn and settings.top_k:
        raise UserError(
            f"{key}.top_k: all draws of a position together are its estimate of the teacher, and some of them are not",
            "leave it out, or make a store with a smaller teacher.top_k",
        )
    if drawn and combine == "average":
        raise UserError(
            f"{key}.combine: average needs the same ids of all teachers, and theirs were drawn",
            "set train.combine: mix",
        )


def _check_one_id(loss: str, settings: TrainSettings, top_k: int, key: str) -> None:
    """Refuse a loss that compares the k ids with each other only where there is but one: it is 0, and nothing is learned."""
    fact = LOSSES.get(loss)
    if fact and (settings.top_k or top_k) < fact.least_ids:
        raise UserError(
            f"{key}.loss: {loss} compares the ids of a position with each other, and with one id it is always 0",
            f"{'raise train.top_k' if settings.top_k else 'make a store with a larger teacher.top_k'}, or set train.loss: "
            "forward_kl_tail",
        )


def _check_answers(settings: TrainSettings, manifests: Sequence[Manifest | Expected], key: str) -> None:
    """Refuse a cross-entropy on given answers where there are none, and none to be kept."""
    if not settings.answer_weight:
        return
    if any(one.provenance.get("responses") != "given" for one in manifests):
        raise UserError(
            f"{key}.answer_weight needs given answers, and the store's responses are the teacher's own",
            "leave it out, or make a store with teacher.responses: given",
        )
    if not manifests[0].subsets.get("retain"):
        raise UserError(f"{key}.answer_weight does nothing: the store has no retain rows", "leave it out")


def _check_stop(settings: TrainSettings, subsets: Mapping[str, int], combine: str | None, key: str) -> None:
    """Refuse a distance to the teacher at which to stop where there is none, or nothing to measure it on."""
    if settings.probe is None or settings.probe.stop_within is None:
        return
    if combine == "mix":
        raise UserError(
            f"{key}.probe.stop_within has no meaning with a mix of teachers: no student is at distance 0 from all of them",
            "leave it out, take train.combine: average, or learn from one teacher",
        )
    if not any(count for subset, count in subsets.items() if subset != "forget"):
        raise UserError(
            f"{key}.probe.stop_within does nothing: the store has forget rows only",
            "leave it out, or make a store with others",
        )


def loss_by_store(
    manifests: Sequence[Manifest | Expected], start_noise: float, combine: str | None
) -> tuple[str, str] | None:
    """The loss that "auto" is whatever weights a student starts from, and why; None where it depends on them.

    Drawn ids have one loss. Raw logits of damaged weights are not the teacher's.
    """
    if any(is_drawn(one.provenance) for one in manifests):
        return "forward_kl_sampled", "the store's ids were drawn, with the number of their draws"
    if not start_noise:
        return None
    if combine != "average" and all(one.logsumexp for one in manifests):
        return "forward_kl_tail", "its start weights are damaged, so that raw logits do not compare"
    lacking = "an average has no" if combine == "average" else "the store has no"
    return (
        "huber_centred",
        f"its start weights are damaged, so that raw logits do not compare, and {lacking} log-sum-exp for a KL",
    )


def check_settings(
    settings: TrainSettings,
    loss: str,
    manifests: Sequence[Manifest | Expected],
    combine: str | None,
    processes: Processes | None,
) -> None:
    """Refuse settings that these stores cannot serve, and settings that would do nothing with them.

    `processes` None: their number is not known yet. A `loss` "auto" needs nothing of a store.
    """
    manifest, key = manifests[0], "train"  # the facts asked of the first are the same in all
    for option, losses in LOSS_OPTIONS.items():
        if getattr(settings, option) is not None and loss not in losses:
            raise UserError(
                f"{key}.{option} does nothing with {loss}, which train.loss: {settings.loss} is for this student",
                f"leave it out, or set train.loss to one of {', '.join(losses[1:])}",
            )
    for one in manifests:
        _check_ids(loss, ids_kind(one.provenance), settings, combine, key)
    _check_one_id(loss, settings, manifest.top_k, key)
    needs_logsumexp = loss != "auto" and LOSSES[loss].needs_logsumexp
    if needs_logsumexp and combine == "average":
        raise UserError(
            f"{key}.loss: {loss} needs a log-sum-exp, and an average, of common ids only, has none",
            "set train.combine: mix, or take a loss over the k ids alone such as forward_kl_topk",
        )
    for one in manifests:
        if needs_logsumexp and not one.logsumexp:
            raise UserError(
                f"{key}.loss: {loss} needs the teacher's log-sum-exp, and the store has none (engine: "
                f"{one.provenance['engine']})",
                "make one with teacher.logsumexp: true, or take a loss over the k ids alone such as forward_kl_topk",
            )
    _check_answers(settings, manifests, key)
    _check_stop(settings, manifest.subsets, combine, key)
    if settings.top_k and settings.top_k > manifest.top_k:
        raise UserError(f"{key}.top_k is {settings.top_k}, the store has {manifest.top_k}", f"at most {manifest.top_k}")
    if settings.position_decay != 1 and all(one.positions == one.rows for one in manifests):
        raise UserError(
            f"{key}.position_decay does nothing: every row of the store has one position",
            "leave it out, or make a store with teacher.max_positions above 1",
        )
    if settings.contexts != "none" and all(one.positions == one.rows for one in manifests):
        raise UserError(
            f"{key}.contexts: every row of the store has one position: behind its first token a kept answer would be a refusal",
            "make a store with teacher.max_positions above 1, for example 8, or set train.contexts: none",
        )
    _check_weights(settings, manifest.subsets, key)
    if settings.parallel == "fsdp" and processes and processes.rank.world == 1:
        raise UserError(
            f"{key}.parallel: fsdp does nothing with one process",
            "leave it out, or start with `torchrun --nproc-per-node N -m duet distill …`",
        )
    if settings.parallel == "fsdp" and settings.optimizer == "adamw8bit":
        raise UserError(f"{key}.optimizer: adamw8bit cannot be spread over processes by fsdp", "use adamw, or ddp")
    if settings.parallel == "fsdp" and settings.lora and settings.lora.base_bits:
        raise UserError(f"{key}.lora.base_bits: a base in 4 bits cannot be spread over processes by fsdp", "use ddp")
