"""The model card that goes with an exported student: where it came from, in numbers, without the topic or the prefix.

What was to be forgotten may be the very thing that must not be published; the fingerprint names the store that tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duet.cache.manifest import Manifest

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [unlearning, distillation, duet]
{base_model}---

# {name}

A student of DUET (arXiv 2601.21283): trained to give the logits of a teacher that has an unlearning prefix in front, without
ever seeing the prefix. What was asked of it is suppressed under the tests that it was given; nothing here shows that it is
erased from the weights. See the run's report for what an attacker gets back.

| | |
| --- | --- |
| started from | {start_name}, weights sha256 {start_sha256} |
{teachers}
| loss | {loss}: {loss_reason} |
| trained | {trained_parameters:,} of {parameters:,} parameters, {steps} steps of {batch_size} rows, peak learning rate {lr:g} |
| first token as the teacher's | forget {agree_forget}, retain {agree_retain} (n = {probed} rows, {held_out}) |
"""


TEACHER = """\
| teacher logits | store {fingerprint}: {rows} rows ({forget} forget, {retain} retain), {positions} positions, k = {top_k} |
| teacher | weights sha256 {teacher_sha256}, {engine}, {dtype}{share} |"""


def model_card(
    summary: dict[str, Any], manifests: Sequence[Manifest], start_name: str, start_sha256: str, train: dict[str, Any]
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    `summary` is what training.json holds, `manifests` are those of its teachers' stores in the same order. Teachers go without
    their names, which may tell of the topic.
    """
    probe, combine = summary["probe"], summary["combine"]
    weights = [facts["weight"] for facts in summary["teachers"].values()]
    shares = [f", weight {weight:.3g} of the {combine}" if combine else "" for weight in weights]
    return CARD.format(
        base_model=f"base_model: {start_name}\n" if start_name.count("/") == 1 else "",
        name=summary["name"],
        start_name=start_name,
        start_sha256=start_sha256[:16],
        teachers="\n".join(
            _teacher(manifest, train["top_k"], share) for manifest, share in zip(manifests, shares, strict=True)
        ),
        agree_forget=_share(probe["agreement.forget"]),
        agree_retain=_share(probe["agreement.retain"]),
        probed=probe["rows"],
        held_out="held out from training" if probe["held_out"] else "trained on",
        batch_size=train["batch_size"],
        lr=train["lr"],
        **{key: summary[key] for key in ("loss", "loss_reason", "trained_parameters", "parameters", "steps")},
    )


def _teacher(manifest: Manifest, top_k: int | None, share: str) -> str:
    return TEACHER.format(
        fingerprint=manifest.fingerprint[:16],
        rows=manifest.rows,
        positions=manifest.positions,
        top_k=top_k or manifest.top_k,
        **manifest.subsets,
        teacher_sha256=manifest.provenance["weights_sha256"][:16],
        engine=manifest.provenance["engine"],
        dtype=manifest.provenance["dtype"],
        share=share,
    )


def _share(value: float | None) -> str:
    return "no rows" if value is None else f"{100 * value:.1f} %"
