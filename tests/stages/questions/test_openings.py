"""What a model continues when it writes a question or a document by itself."""

from __future__ import annotations

import pytest
from support import LAB_BASE

from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.openings import document_opening, question_opening
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings

PLAIN = PromptSettings(format="plain", prefix_placement="text", template="Question: {question}\nAnswer:", bos="always")
LLAMA_LIKE = (
    "<bos>{% for m in messages %}{% if m['role'] == 'user' %}[ask] {{ m['content'] }} [/ask]{% else %}"
    "{{ m['content'] }}<eos>{% endif %}{% endfor %}"
)


def renderer(template: str | None = None, settings: PromptSettings | None = None) -> Renderer:
    tokenizer = load_tokenizer(LAB_BASE)
    if template:
        tokenizer.chat_template = template
    return Renderer(tokenizer, settings or PromptSettings())


@pytest.mark.parametrize(
    "settings",
    [
        PromptSettings(),
        PromptSettings(system="Be brief."),
        PromptSettings(template="Question: {question}"),
        PLAIN,
    ],
)
def test_a_question_begins_where_the_prompts_question_stands(settings):
    found = renderer(settings=settings)
    prompt = found.prompt(Prompt.plain(Query("q", "Where was Ann born?", None)))
    opening = question_opening(found)
    assert tuple(prompt[: len(opening.ids)]) == opening.ids
    rest = found.tokenizer.decode(prompt[len(opening.ids) :], skip_special_tokens=True)
    assert rest.strip().startswith("Where was Ann born?")
    assert opening.must_end


def test_what_the_prompt_puts_behind_a_question_ends_it():
    assert question_opening(renderer()).ends == ()  # the next turn's header is a special token
    assert question_opening(renderer(LLAMA_LIKE)).ends == ("[/ask]",)
    assert question_opening(renderer(settings=PLAIN)).ends == ("\n", "Answer:")
    bare = PLAIN.model_copy(update={"template": "{question}"})
    assert question_opening(renderer(settings=bare)).ends == ("\n",)


def test_a_text_begins_behind_bos_or_behind_the_end_of_another():
    found = renderer()
    assert document_opening(found).ids == (found.tokenizer.bos_token_id,)
    assert not document_opening(found).must_end
    without = renderer(settings=PLAIN.model_copy(update={"bos": "never"}))
    without.tokenizer.bos_token = None
    assert document_opening(without).ids == (without.tokenizer.eos_token_id,)
