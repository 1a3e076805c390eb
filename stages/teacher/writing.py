"""Texts that a model writes by itself, for broad rows: drawn one by one, and of those what is useless dropped and counted.

The text of a try depends on the seed and the number of the try alone, and tries are taken in their order: how many are drawn
at a time makes no difference, and neither does a stop between two of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from duet.cache.errors import UserError
from duet.cache.watch import Watch
from duet.stages.engines.choose import open_engine
from duet.stages.engines.interface import Ask, Engine, Request
from duet.stages.models.directory import load_config
from duet.stages.models.identity import weights_sha256
from duet.stages.models.limits import context_length
from duet.stages.models.tokenizers import special_tokens, tokenizer_sha256
from duet.stages.questions.openings import Opening
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.proof import prove
from duet.stages.questions.queries import Query
from duet.stages.questions.text_files import fault_of
from duet.stages.settings.teacher import TeacherSettings
from duet.stages.teacher.kept_tries import KeptTries, Text
from duet.stages.teacher.plan import row_seed
from duet.stages.teacher.prepare import engine_spec

BROKEN = "\ufffd"  # what tokenizers write for part of a character
TRIES = 20  # per row that is wanted, at most
CALL = 512  # tries in one call of the engine; those of the first one show what the model writes often


@dataclass(frozen=True)
class Wanted:
    """How many texts, and how they are drawn."""

    rows: int
    max_tokens: int
    temperature: float = 1.0
    seed: int = 0


@dataclass
class Written:
    """Texts in the order of their tries, and how many tries were dropped, by reason."""

    texts: dict[str, None] = field(default_factory=dict)
    tries: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def open_writer(
    model_dir: Path, teacher: TeacherSettings, renderer: Renderer, longest: int, device: str
) -> tuple[Engine, str]:
    """The engine, for texts with beginnings of up to `longest` tokens, and why it was taken."""
    spec = engine_spec(model_dir, teacher, renderer, longest, device)
    return open_engine(replace(spec, eos_ids=tuple(sorted(_ending_ids(renderer)))), teacher.engine)


def kept_tries(
    path: Path, model_dir: Path, teacher: TeacherSettings, renderer: Renderer, opening: Opening, wanted: Wanted
) -> KeptTries:
    """What an earlier sample of the same model, opening and draws has left in `path`; UserError where it was another one."""
    draws = {key: value for key, value in vars(wanted).items() if key != "rows"}
    model = {"weights": weights_sha256(model_dir), "dtype": teacher.dtype, "quantization": teacher.quantization}
    tokens = {"tokenizer": tokenizer_sha256(renderer.tokenizer), "ending": sorted(_ending_ids(renderer))}
    return KeptTries(path, {**vars(opening), **draws, **model, **tokens})


def check_room(opening: Opening, max_tokens: int, model_dir: Path, trust_remote_code: bool) -> None:
    """Refuse texts that do not fit in the model's context."""
    room = context_length(load_config(model_dir, trust_remote_code)) - len(opening.ids)
    if max_tokens > room:
        raise UserError(
            f"--max-tokens {max_tokens}: behind the {len(opening.ids)} tokens of the beginning the model has room for {room}",
            f"set it to at most {room}",
        )


@dataclass(frozen=True)
class Writer:
    """An engine that continues one opening. `forgotten_of` makes, of the first texts, the judge of what is about the topic.

    Of `tries` it takes what is there, and puts there what it draws.
    """

    engine: Engine
    renderer: Renderer
    opening: Opening
    forgotten_of: Callable[[Sequence[str]], Callable[[str], bool]]
    tries: MutableMapping[int, Text] = field(default_factory=dict)

    def write(self, wanted: Wanted, watch: Watch) -> Written:
        """The first `wanted.rows` texts that are of use, or as many as there are in `TRIES` times as many tries.

        `watch.on_progress` gets "rows", how many there are, and of how many.
        """
        found, drawn = Written(), self._drawn(wanted, watch)
        first = list(islice(drawn, CALL))
        is_forgotten = self.forgotten_of([text for text, _ in first])
        for text, ended in chain(first, drawn):
            found.tries += 1
            if fault := self._fault(text, ended, found, is_forgotten):
                found.dropped[fault] += 1
            else:
                found.texts[text] = None
                watch.on_progress("rows", len(found.texts), wanted.rows)
            if len(found.texts) == wanted.rows:
                break
        return found

    def _drawn(self, wanted: Wanted, watch: Watch) -> Iterator[Text]:
        """The text of each try, in order, and whether it came to an end."""
        ask = Ask(top_k=1, max_positions=wanted.max_tokens, temperature=wanted.temperature)
        most = max(CALL, TRIES * wanted.rows)
        for start in range(0, most, CALL):
            numbers = range(start, min(start + CALL, most))
            seeds = {i: row_seed(wanted.seed, f"sample/{i}") for i in numbers if i not in self.tries}
            requests = [Request(i, self.opening.ids, seed=seed) for i, seed in seeds.items()]
            with closing(self.engine.stream(requests, ask)) as drawn:
                for number, scored in drawn:
                    self.tries[number] = self.text(scored.response_ids.tolist())
                    watch.pause("what was being drawn")
            yield from (self.tries[i] for i in numbers)

    def text(self, ids: Sequence[int]) -> Text:
        """The text that the model wrote, up to the first of its ends, and whether it came to one."""
        ended = bool(ids) and ids[-1] in self._special
        text = self.renderer.tokenizer.decode([i for i in ids if i not in self._special])
        at = min((at for end in self.opening.ends if (at := text.find(end)) >= 0), default=None)
        return text[:at].strip(), ended or at is not None

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(_ending_ids(self.renderer))

    def _fault(self, text: str, ended: bool, found: Written, is_forgotten: Callable[[str], bool]) -> str:
        """What makes a text useless, in the words of the count; empty: nothing."""
        if self.opening.must_end and not ended:
            return "without an end"
        if not text:
            return "empty"
        if text in found.texts:
            return "written before"
        if not self._can_be_asked(text):
            return "that no prompt can hold"
        return "about the topic" if is_forgotten(text) else ""

    def _can_be_asked(self, text: str) -> bool:
        """Whether stage one will take the text."""
        query = Query("", text, None)
        try:
            prove(self.renderer, {"": [query]}, {}, ("question",))
            self.renderer.prompt(Prompt(query, text, bare=not self.opening.must_end))
        except UserError:
            return False
        return not fault_of(text) and BROKEN not in text


def _ending_ids(renderer: Renderer) -> set[int]:
    """Every special token ends a text: behind it the next turn would begin."""
    return {*renderer.stop_ids, *renderer.tokenizer.convert_tokens_to_ids(special_tokens(renderer.tokenizer))}
