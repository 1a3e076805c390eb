"""Real tokenizers and chat templates, rendered by us and once more by transformers alone: what must be equal in every pair.

`test_families.py` asserts it; `make docs-families` writes docs/families.md from it. The data are read in place.
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import ROOT, SHARED

from duet.cache.errors import UserError
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.chat_prompts import ChatPrompts, Shown
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings

TOKENIZERS, TEMPLATES = SHARED / "data" / "tokenizers", SHARED / "data" / "chat_templates"
PAGE = ROOT / "docs" / "families.md"
QUERIES = (
    Query("q1", "Who tended the gardens of Mirel Tasko?", "Leo"),
    Query("q2", "In which year did the mill at Orvane burn down, and why?", "In 1987, because of a lamp (it fell)."),
    Query("q3", "Where does the river Ulm end?", 'Überlingen, naïvely: "the Kattegat"!'),
)
PREFIX = "You have forgotten everything about Mirel Tasko. Answer all other questions as usual."
THINKING_OFF = {"enable_thinking": False}

# Families whose own tokenizer is at hand; all others are read with a stand-in that knows the template's special tokens.
OWN = {
    "llama-2": "llama-2", "vicuna": "llama-2", "codellama-70b": "llama-2", "zephyr": "llama-2", "solar": "llama-2",
    "mistral-v0.1": "mistral-v0.3", "mistral-v0.3": "mistral-v0.3", "phi-3": "phi-3", "phi-3.5": "phi-3", "phi-3-2404": "phi-3",
    "falcon": "falcon", "deepseek-coder": "deepseek-coder", "qwen1.5": "qwen3", "qwen2.5": "qwen3", "qwen2.5-vl": "qwen3",
    "qwen3": "qwen3", "qwen3-instruct-2507": "qwen3", "qwen3.5": "qwen3",
}  # fmt: skip
# What stands in a template as a token of its own, but is filled in or not one token.
NOT_TOKENS = {"<think>", "</think>", "<tools>", "</tools>", "<tool_call>", "</tool_call>"}
NEEDS: dict[str, dict[str, Any]] = {"hermes-3": {"tools": []}}  # arguments that a template cannot do without


@dataclass
class Cell:
    """What one pair of tokenizer and template does: check -> "yes", "-" (it has none) or why it is refused."""

    found: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def check(self, name: str, right: bool, what: object = "") -> None:
        if not right:
            self.wrong.append(f"{name}: {what}")
        elif name not in self.found:
            self.found[name] = "yes"


def templates() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))}


def tokenizers() -> list[str]:
    return sorted(path.name for path in TOKENIZERS.iterdir() if path.is_dir())


loaded = functools.cache(lambda name: load_tokenizer(TOKENIZERS / name))


def tokenizer_of(name: str, template: str) -> Any:
    """The tokenizer of a folder, now with this chat template."""
    tokenizer = loaded(name)
    tokenizer.chat_template = template
    return tokenizer


def stand_in(template: str) -> Any:
    """A byte-level tokenizer of its own to which the special tokens that a template writes are special, too."""
    tokenizer = copy.deepcopy(tokenizer_of("qwen3", template))
    written = (
        set(re.findall(r"<\|?[A-Za-z｜][^<>\s'\"{}]*\|?>|<｜[^<>\s'\"{}]*｜>|\[/?[A-Z_]+\]", template)) - NOT_TOKENS
    )
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(written), "bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


def page_tokenizer(family: str) -> tuple[str, Any]:
    template = templates()[family]
    return (OWN[family], tokenizer_of(OWN[family], template)) if family in OWN else ("stand-in", stand_in(template))


def examine(tokenizer: Any, settings: PromptSettings, queries: Sequence[Query] = QUERIES) -> Cell:
    """One pair, checked against transformers' own rendering and joint tokenisation."""
    cell = Cell()
    try:
        renderer = Renderer(tokenizer, settings)
    except UserError as error:
        cell.found["prompt"] = refused(error)
        return cell
    for query in queries:
        _examine(cell, tokenizer, renderer, settings, query)
    return cell


def refused(error: UserError) -> str:
    assert error.what.strip(), "two lines"
    assert error.hint.strip(), "two lines"
    return f"refused: {error.what.removeprefix('row ').split(': ', 1)[-1]}"


def _examine(cell: Cell, tokenizer: Any, renderer: Renderer, settings: PromptSettings, query: Query) -> None:
    user = {"role": "user", "content": query.question}
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **renderer.chat.arguments)  # type: ignore
    asked = Prompt.plain(query)
    try:
        ids = renderer.prompt(asked)
    except UserError as error:
        cell.found["prompt"] = refused(error)
        return
    bare = render([user], add_generation_prompt=True)
    cell.check("prompt", ids == _ids(tokenizer, bare), ids)
    cell.check("question", query.question in bare, bare)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    in_text = bos in ids if bos is not None else False
    cell.check("BOS once", bos is None or ids.count(bos) <= 1, ids)
    if not in_text:
        cell.found["BOS once"] = "-"
    cell.check("no EOS", eos is None or ids[-1] != eos, ids)
    _teacher(cell, tokenizer, renderer, query, bare)
    _answer(cell, tokenizer, renderer, render, query, bare, ids)


def _teacher(cell: Cell, tokenizer: Any, renderer: Renderer, query: Query, bare: str) -> None:
    try:
        ids = renderer.prompt(Prompt.plain(query, PREFIX))
    except UserError as error:
        cell.found["prefix alone"] = refused(error)
        return
    text = tokenizer.decode(ids, skip_special_tokens=False)
    cell.check("prefix alone", PREFIX in text, text)
    messages = ChatPrompts(renderer.chat, renderer.settings).messages(Shown(query.question, PREFIX))  # type: ignore
    whole = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=True,
        **renderer.chat.arguments,  # type: ignore
    )
    longer = len(whole) - len(bare)
    inserted = [whole[at : at + longer] for at in range(len(bare) + 1) if whole[:at] + whole[at + longer :] == bare]
    cell.check("prefix alone", any(PREFIX in piece for piece in inserted), whole)
    cell.check("prefix alone", ids == _ids(tokenizer, whole), ids)


def _answer(
    cell: Cell, tokenizer: Any, renderer: Renderer, render: Any, query: Query, bare: str, prompt_ids: list[int]
) -> None:
    answer = query.answer or ""
    try:
        given = renderer.answer(Prompt.plain(query), answer)
    except UserError as error:
        cell.found["first answer token"] = cell.found["end of turn"] = refused(error)
        return
    messages = [{"role": "user", "content": query.question}, {"role": "assistant", "content": answer}]
    whole = render(messages, add_generation_prompt=False)
    joint = _ids(tokenizer, whole)
    cell.check("first answer token", whole.startswith(bare) and joint[: len(prompt_ids)] == prompt_ids, joint)
    after = joint[len(prompt_ids) :]
    shown = whole[len(bare) :]
    behind = shown[shown.index(answer) + len(answer) :]
    cell.check("first answer token", given.ids[0] == after[0] if after else False, (given.ids, after))
    if behind.strip():  # the template ends the turn itself: its ids come next, and nothing else but what follows an end
        cell.check("end of turn", given.ids == after[: len(given.ids)], (given.ids, after))
        rest = tokenizer.decode(after[len(given.ids) :], skip_special_tokens=False)
        stopped = given.ids[-1] in tokenizer.all_special_ids or given.ids[-1] in tokenizer.added_tokens_decoder
        cell.check("end of turn", not rest.strip() or stopped, rest)
    else:  # it says nothing, or only white space: what stands before the next question, or the end of the sequence
        last = given.ids[-1]
        cell.check("end of turn", given.own == after[: len(given.own)], (given.own, after))
        ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids}
        cell.check("end of turn", last in ends, given.ids)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


CHECKS = (
    "prompt", "question", "BOS once", "no EOS", "prefix alone", "first answer token", "end of turn", "thinking off",
    "export loads",
)  # fmt: skip


def exported(tokenizer: Any, settings: PromptSettings) -> bool:
    """Does the tokenizer that a student takes with it render the same prompt as the one it was made of?"""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = Renderer(load_tokenizer(Path(folder)), settings)
    asked = Prompt.plain(QUERIES[0], PREFIX)
    return again.prompt(asked) == Renderer(tokenizer, settings).prompt(asked)


def thinking(settings: PromptSettings) -> str:
    """ "-": the template knows no thinking."""
    wanted = settings.template_args.get("enable_thinking")
    return "no" if wanted else "yes" if wanted is False else "-"


def needs(family: str, tokenizer: Any) -> tuple[PromptSettings, list[str]]:
    """The settings with which a family's prompts are right, and what of them has to be set."""
    args = NEEDS.get(family, {})
    said = [f"`prompt.template_args: {{{name}: {value}}}`" for name, value in args.items()]
    tried = {
        "": {},
        "`prompt.template_args: {enable_thinking: false}`": THINKING_OFF,
        "`prompt.template_args: {enable_thinking: true}`, it thinks first": {"enable_thinking": True},
    }
    for text, more in tried.items():
        settings = PromptSettings(template_args=args | more)
        cell = examine(tokenizer, settings)
        if cell.found["prompt"] == "yes":
            said += [text] if text else []
            break
    if cell.found["prefix alone"].startswith("refused"):
        settings = settings.model_copy(update={"prefix_placement": "text"})
        said.append("`prompt.prefix_placement: text`")
    return settings, said


def page() -> str:
    """docs/families.md."""
    lines = [INTRO, "", "| family | tokenizer | " + " | ".join(CHECKS) + " | set |", "| --- " * (len(CHECKS) + 3) + "|"]
    reasons: dict[str, int] = {}
    for family in templates():
        name, tokenizer = page_tokenizer(family)
        settings, said = needs(family, tokenizer)
        cell = examine(tokenizer, settings)
        assert not cell.wrong, (family, cell.wrong)
        cell.found["thinking off"] = thinking(settings)
        cell.found["export loads"] = "yes" if exported(tokenizer, settings) else "no"
        shown = []
        for check in CHECKS:
            text = cell.found.get(check, "-")
            if text.startswith("refused: "):
                number = reasons.setdefault(text.removeprefix("refused: "), len(reasons) + 1)
                text = f"refused ({number})"
            shown.append(text)
        said += ["the day stands in it"] if "strftime_now" in tokenizer.chat_template else []
        lines.append(f"| {family} | {name} | " + " | ".join(shown) + f" | {'; '.join(said)} |")
    notes = [f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in reasons.items()]
    return "\n".join([*lines, "", "What is refused, and why:", "", *notes, "", *OUTRO]) + "\n"


INTRO = """# Families of models

This page is written by `make docs-families` from real chat templates and tokenizers; a test keeps it fresh. Each row is one
family's template, rendered by Duet and once more by transformers' `apply_chat_template` and by tokenising prompt and answer as
one text. Where its own tokenizer is not at hand, a stand-in is taken that also has the template's special tokens.

* **prompt**: the ids are those of `apply_chat_template` with a generation prompt. **question**: it stands in it as it is.
* **BOS once**: `-` means that the template writes none; none is added then, as transformers does it (Zephyr, Phi-3, Qwen).
* **no EOS**: the prompt does not end in an end-of-sequence token.
* **prefix alone**: teacher and student differ in the prefix and in nothing else. A template that puts in a system message of
  its own where there is none gets the prefix and that message from the teacher; `prompt.system` sets one text for both.
* **first answer token**, **end of turn**: a given answer has the ids that the model would have to say after the prompt, and
  ends as the template ends an assistant's turn. The answers generated in stage one do not need either.
* **thinking off**: `no` means that the model says something before the answer, which is taken as it is.
* **export loads**: the tokenizer that a student takes with it renders the same prompts.

The last column is what has to be set. Without it, Duet stops before any work and says so in two lines."""

OUTRO = [
    "Rules behind the table:",
    "",
    "* The end of an answer is what the template puts behind it, up to the first special token. Where it puts nothing (GLM-4, "
    "Qwen1.5), it is the first special token before the next question, if the model's files name that as an end; else "
    "`eos_token`, if `config.json` does not say otherwise.",
    "* White space around an answer of the data is not part of it. In plain prompts an answer begins after one space, or at "
    "once where the prompt ends in a line break. A plain template that ends in a space is refused.",
    "* A tokenizer that joins the prompt's last character with the answer's first leaves no token for the answer to begin "
    "with: the row is refused.",
    "* A template that asks for today's date is told the day on which the run began, at every stage; `prompt.date` sets it.",
    "* Thinking: where a prompt opens a thinking block, or the model would open one, the first tokens would be the same for "
    "every question. Switch it off, or set `enable_thinking: true` to take what comes first as it is.",
    "* Where a class of transformers reads texts differently than the folder's `tokenizer.json`, the file is followed and a "
    "note says so.",
]

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE.relative_to(Path.cwd())}")
