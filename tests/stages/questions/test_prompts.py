"""Prompts: the prefix is where it should be, leaves no trace where there is none, and nothing is ever cut."""

from __future__ import annotations

import pytest
from support import LAB_BASE

from duet.cache.errors import UserError
from duet.stages.models.limits import check_length
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompt_checks import check_prompt_settings
from duet.stages.questions.prompts import Prompt, Renderer, open_renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings

CHAT = PromptSettings()
PLAIN = PromptSettings(format="plain", prefix_placement="text", template="Question: {question}\nAnswer:", bos="always")
PLAIN_WITH_SPACE = PLAIN.model_copy(update={"template": "Question: {question}\nAnswer: "})
PREFIXES = ("", "X", "You have forgotten everything about Ann. " * 20)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(LAB_BASE)


def render(tokenizer, question, prefix, settings):
    return Renderer(tokenizer, settings).prompt(Prompt.plain(Query("q", question, None), prefix))


def text(tokenizer, ids):
    return tokenizer.decode(ids)


@pytest.mark.parametrize("settings", [CHAT, CHAT.model_copy(update={"prefix_placement": "text"}), PLAIN])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_prefix_is_the_only_difference(tokenizer, settings, prefix):
    with_prefix, without = (render(tokenizer, "Who is Ann?", p, settings) for p in (prefix, ""))
    assert with_prefix.count(tokenizer.bos_token_id) == 1
    assert with_prefix[0] == without[0] == tokenizer.bos_token_id
    assert prefix in text(tokenizer, with_prefix)
    tail = without[2:]
    assert with_prefix[-len(tail) :] == tail


def test_where_the_prefix_goes(tokenizer):
    assert text(tokenizer, render(tokenizer, "Q?", "P.", CHAT)) == "<bos><|system|>P.<|user|>Q?<|assistant|>"
    placed = CHAT.model_copy(update={"prefix_placement": "text"})
    assert text(tokenizer, render(tokenizer, "Q?", "P.", placed)) == "<bos><|user|>P.\nQ?<|assistant|>"
    assert text(tokenizer, render(tokenizer, "Q?", "P.", PLAIN)) == "<bos>P.\nQuestion: Q?\nAnswer:"


def test_two_bos_tokens_are_refused(tokenizer):
    settings = PLAIN.model_copy(update={"template": "<bos>{question}"})
    with pytest.raises(UserError, match="two BOS"):
        render(tokenizer, "Q?", "", settings)


def test_a_template_that_drops_the_system_message_is_refused():
    tokenizer = load_tokenizer(LAB_BASE)
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    assert render(tokenizer, "Q?", "", CHAT)
    with pytest.raises(UserError, match="drops the system message"):
        render(tokenizer, "Q?", "P.", CHAT)


def test_settings_that_cannot_be_rendered_are_refused(tokenizer):
    bare = load_tokenizer(LAB_BASE)
    bare.chat_template = None
    for settings, message in (
        (CHAT.model_copy(update={"template": "no place"}), "lacks"),
        (PLAIN.model_copy(update={"prefix_placement": "system"}), "no system message"),
    ):
        with pytest.raises(UserError, match=message):
            check_prompt_settings(tokenizer, settings)
    with pytest.raises(UserError, match="ends in a space"):
        open_renderer(LAB_BASE, PLAIN_WITH_SPACE)
    with pytest.raises(UserError, match="no chat template"):
        Renderer(bare, CHAT)


def test_a_prompt_that_does_not_fit_is_refused_and_one_that_just_fits_is_not():
    check_length([1] * 10, 2, 12, "forget/1", "teacher")
    with pytest.raises(UserError, match=r"forget/1.*10 tokens and 2 are to follow.*context is 11"):
        check_length([1] * 10, 2, 11, "forget/1", "teacher")
