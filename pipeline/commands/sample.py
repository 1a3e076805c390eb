"""`duet sample`: a config in, a file of questions or documents out that the base model wrote by itself, for `data.broad`.

Broad rows are answered without the prefix, so one about the topic would teach what is to be forgotten. Left out is each text
that names a topic, or has a word of one or of the forget questions and answers. A word that retain rows have too does not
count, nor one that many of the first texts have, unless it is the topic's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet.cache.errors import UserError
from duet.cache.files import is_writable, publishing
from duet.cache.watch import Watch
from duet.pipeline.config.schema import Config
from duet.pipeline.run.directory import StopSignal
from duet.pipeline.run.terminal import progress_bar, say, say_engine

if TYPE_CHECKING:
    from duet.stages.teacher.writing import Written

LONGEST = {"question": 64, "text": 256}  # tokens, where --max-tokens is not given


def sample(
    config: Config, out: Path, questions: int | None, documents: int | None, max_tokens: int | None, **how: Any
) -> None:
    """Write `out`; until then what is drawn lies beside it, in a file `.part`. `how` has the seed and the temperature."""
    from duet.stages.models.directory import resolve_model
    from duet.stages.questions.openings import document_opening, question_opening
    from duet.stages.questions.prompts import open_renderer
    from duet.stages.teacher.writing import Wanted, Writer, check_room, kept_tries, open_writer

    _check(out, questions, documents)
    teacher = config.teacher.model_copy(update={"model": config.base_model})
    model_dir = resolve_model(teacher.model, "evaluate.base" if config.evaluate.base else "teacher.model")
    renderer = open_renderer(model_dir, config.prompt, teacher.trust_remote_code)
    opening = question_opening(renderer) if questions else document_opening(renderer)
    wanted = Wanted(questions or documents or 0, max_tokens or LONGEST[opening.field], **how)
    check_room(opening, wanted.max_tokens, model_dir, teacher.trust_remote_code)
    words = known(config)
    tries = kept_tries(out.with_name(f"{out.name}.part"), model_dir, teacher, renderer, opening, wanted)
    if tries:
        say(f"the sample goes on; texts drawn before: {len(tries)}")
    stop = StopSignal()
    longest = len(opening.ids) + wanted.max_tokens
    engine, why = open_writer(model_dir, teacher, renderer, longest, config.device)
    say_engine(engine.name, why)
    try:
        with progress_bar("rows") as bar:
            watch = Watch(bar.update, should_stop=stop)
            found = Writer(engine, renderer, opening, partial(forgotten, words), tries).write(wanted, watch)
    finally:
        engine.close()
    if found.texts:  # also fewer than wanted, which took as long to write
        with publishing(out) as temporary:
            rows = (json.dumps({opening.field: text}, ensure_ascii=False) for text in found.texts)
            temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    tries.remove()
    _tell(found, wanted.rows, out)
    key = "path" if opening.must_end else "documents"
    say(f"{len(found.texts)} rows: {out}; in the config: data: {{broad: {{sampled: {{{key}: {out}}}}}}}")


@dataclass(frozen=True)
class Known:
    """The words, stemmed, of topics, forget sets and retain sets, and each topic's name as spaced words."""

    topic: frozenset[str]
    forget: frozenset[str]
    retain: frozenset[str]
    names: tuple[str, ...]


def known(config: Config) -> Known:
    """Read from the config and its sets."""
    from duet.stages.metrics.text import stems
    from duet.stages.questions.requests import queries_of

    topics = [config.topic, *(request.topic for request in config.requests)]
    texts: dict[str, list[str]] = {"topic": topics, "forget": [], "retain": []}
    for by_subset in queries_of(config.data, config.requests).values():
        for subset, queries in by_subset.items():
            texts[subset] += [text for q in queries for text in (*q.texts, q.answer or "")]
    words = {what: frozenset[str]().union(*map(stems, of)) for what, of in texts.items()}
    return Known(**words, names=tuple(map(_spaced, topics)))


def forgotten(known: Known, first: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text is about a topic, by its words. `first` are texts of the model that show which words are common."""
    from duet.stages.metrics.text import COMMON_SHARE, stems

    counts = Counter(word for text in first for word in stems(text))
    common = {word for word, count in counts.items() if count > COMMON_SHARE * len(first)}
    own = (known.topic | (known.forget - common)) - known.retain

    def about(text: str) -> bool:
        spaced = _spaced(text)
        return bool(stems(text) & own) or any(name in spaced for name in known.names)

    return about


def _spaced(text: str) -> str:
    from duet.stages.metrics.words import split_words

    return f" {' '.join(split_words(text))} "


def _check(out: Path, questions: int | None, documents: int | None) -> None:
    """Refuse, before a model is loaded, what could not be written."""
    if bool(questions) == bool(documents):
        given = "--questions and --documents were both given" if questions else "neither --questions nor --documents"
        raise UserError(given, "say one of them; call the command twice for a file of each")
    if out.suffix != ".jsonl":
        raise UserError(f"{out} does not end in .jsonl", f"name the file {out.with_suffix('.jsonl')}")
    if out.exists():
        raise UserError(f"{out} is there already, and is not written again", "name another file, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"no such directory: {out.parent}", "make it, or name another file")
    if not is_writable(out.parent):
        raise UserError(f"no permission to write in {out.parent}", "name a file elsewhere")


def _tell(found: Written, wanted: int, out: Path) -> None:
    """What was drawn and dropped; UserError where too little is left, and written to `out`."""
    dropped = ", ".join(f"{count} {why}" for why, count in found.dropped.most_common()) or "none"
    say(f"texts drawn: {found.tries}; dropped: {dropped}")
    if len(found.texts) < wanted:
        raise UserError(
            f"of {found.tries} texts that were drawn only {len(found.texts)} are left, {wanted} are wanted",
            f"these are in {out}: take them, or name another file and raise --temperature or --max-tokens"
            if found.texts
            else "raise --max-tokens, or ask for the other kind: this model may not continue such a beginning",
        )
