"""The model cards of exported models: where a model came from, in numbers, without the topic or the prefix.

What was to be forgotten may be the very thing that must not be published; the fingerprint names the store that knows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from duet.cache.manifest import Manifest
from duet.stages.settings.student import TrainSettings
from duet.stages.settings.teacher import rows_with_prefix
from duet.stages.student.four_bits import is_packed
from duet.stages.student.summary import TrainingSummary

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
{base_model}---

# {name}

"""

STUDENT = """\
A student of DUET (arXiv 2601.21283): trained to give the logits of a teacher that has an unlearning prefix in front, without
ever seeing the prefix. What was asked of it is suppressed under the tests that it was given; nothing here shows that it is
erased from the weights. See the run's report for what an attacker gets back.

| | |
| --- | --- |
| started from | {start_name}, weights sha256 {start_sha256}{noise}{rounded} |
{teachers}
| loss | {loss}: {loss_reason} |
| trained | {trained_parameters:,} of {parameters:,} parameters, {steps} steps of {batch_size} rows, peak learning rate {lr:g} |
| first token as the teacher's | {agree} (n = {probed} rows, {held_out}) |
"""

TEACHER = """\
| teacher logits | store {fingerprint}: {rows} rows ({subsets}), {positions} positions, k = {top_k}; prefix on {prefixed} rows |
| teacher | weights sha256 {teacher_sha256}, {engine}, {dtype}{share} |"""

NOISE = ", damaged: {rest:.3g} of each matrix + {alpha:g} noise (UNDO, arXiv 2506.06278)"

ROUNDED = ", its linear layers rounded to 4 bits (NF4; QLoRA, arXiv 2305.14314)"

COMPARED = """\
Trained by Duet for a comparison of unlearning methods: {method} (arXiv {paper}), from {start_name}, {steps} steps of
{batch_size} rows, peak learning rate {lr:g}. What was asked of it is suppressed under the tests that it was given, at most.
"""


def student_card(
    summary: TrainingSummary, manifests: Sequence[Manifest], start_name: str, start_sha256: str, settings: TrainSettings
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    `manifests` are those of the stores of `summary.teachers`, in the same order. Teachers go without their names, which may
    give the topic away.
    """
    probe, combine = summary.probe, summary.combine
    shares = [
        f", weight {weight:.3g} of the {combine}" if combine else "" for weight in summary.teacher_weights.values()
    ]
    head = HEAD.format(
        tags="unlearning, distillation, duet",
        base_model=f"base_model: {start_name}\n" if start_name.count("/") == 1 else "",
        name=summary.name,
    )
    return head + STUDENT.format(
        start_name=start_name,
        start_sha256=start_sha256[:16],
        noise=NOISE.format(alpha=summary.start_noise, rest=1 - summary.start_noise) if summary.start_noise else "",
        teachers="\n".join(
            _teacher(manifest, settings.top_k, share) for manifest, share in zip(manifests, shares, strict=True)
        ),
        loss=summary.loss,
        loss_reason=summary.loss_reason,
        trained_parameters=summary.trained_parameters,
        parameters=summary.parameters,
        rounded=ROUNDED if is_packed(settings) else "",
        steps=summary.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        agree=", ".join(f"{subset} {_share(probe[f'agreement.{subset}'])}" for subset in manifests[0].subsets),
        probed=probe["rows"],
        held_out="held out from training" if probe["held_out"] else "trained on",
    )


def compared_card(name: str, method: str, paper: str, start_name: str, steps: int, settings: TrainSettings) -> str:
    """The card of a model that another method trained, for a comparison."""
    return HEAD.format(tags="unlearning", base_model="", name=name) + COMPARED.format(
        method=method,
        paper=paper,
        start_name=start_name,
        steps=steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
    )


def _teacher(manifest: Manifest, top_k: int | None, share: str) -> str:
    return TEACHER.format(
        fingerprint=manifest.fingerprint[:16],
        rows=manifest.rows,
        positions=manifest.positions,
        top_k=top_k or manifest.top_k,
        subsets=", ".join(f"{rows} {subset}" for subset, rows in manifest.subsets.items()),
        prefixed=rows_with_prefix(manifest.provenance),
        teacher_sha256=manifest.provenance["weights_sha256"][:16],
        engine=manifest.provenance["engine"],
        dtype=manifest.provenance["dtype"],
        share=share,
    )


def _share(value: float | None) -> str:
    return "no rows" if value is None else f"{100 * value:.1f} %"
