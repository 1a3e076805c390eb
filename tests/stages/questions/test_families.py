"""Every real tokenizer with every chat template is right, or refused in two lines. Right is what transformers alone says."""

from __future__ import annotations

import json
import shutil

import families
import pytest
from families import QUERIES, THINKING_OFF, TOKENIZERS
from support import SHARED

from duet.cache.errors import UserError
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings

pytestmark = pytest.mark.skipif(
    not TOKENIZERS.is_dir(), reason=f"no real tokenizers: {SHARED.name}/data/tokenizers is absent"
)
NAMES = families.tokenizers() if TOKENIZERS.is_dir() else []
PLAIN = PromptSettings(format="plain", prefix_placement="text", template="Question: {question}\nAnswer:")


@pytest.mark.parametrize("name", NAMES)
def test_every_template_is_right_or_refused(name):
    right = 0
    for family, template in families.templates().items():
        tokenizer = families.tokenizer_of(name, template)
        for settings in (PromptSettings(), PromptSettings(template_args=THINKING_OFF)):
            cell = families.examine(tokenizer, settings, QUERIES[:2])
            assert not cell.wrong, (family, cell.wrong)
            right += cell.found.get("first answer token") == "yes"
    assert right > 30, "most pairs work"


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_prompt_and_its_answer_are_one_text(name):
    tokenizer = load_tokenizer(TOKENIZERS / name)
    renderer = Renderer(tokenizer, PLAIN)
    front = [tokenizer.bos_token_id] if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    for query in QUERIES:
        text = f"Question: {query.question}\nAnswer:"
        prompt = front + tokenizer(text, add_special_tokens=False)["input_ids"]
        joint = front + tokenizer(f"{text} {query.answer}", add_special_tokens=False)["input_ids"]
        assert renderer.prompt(Prompt.plain(query)) == prompt
        given = renderer.answer(Prompt.plain(query), f"  {query.answer}\n")
        assert prompt + given.own == joint, "white space around an answer is not part of it"
        assert given.ids == [*given.own, tokenizer.eos_token_id]


def test_the_page_is_fresh():
    assert families.PAGE.read_text(encoding="utf-8") == families.page(), "run `make docs-families`"


@pytest.mark.parametrize(("name", "lost"), [("llama-2", "spaces"), ("deepseek-coder", "spaces")])
def test_a_class_that_ignores_the_tokenizer_file_is_not_followed(name, lost, tmp_path):
    """transformers' LlamaTokenizer, which many folders name, puts its own rules in the place of the file's."""
    shutil.copytree(TOKENIZERS / name, tmp_path / name)
    path = tmp_path / name / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    expected, found = load_tokenizer(TOKENIZERS / name), load_tokenizer(tmp_path / name)
    for text in ("Two  spaces, and\n a line", "  in front", *(q.question for q in QUERIES)):
        assert found(text)["input_ids"] == expected(text)["input_ids"], lost


def test_text_that_is_a_special_token_is_told():
    from duet.stages.questions.proof import prove

    renderer = Renderer(families.tokenizer_of("phi-3", families.templates()["phi-3"]), PromptSettings())
    asked = {"data.forget": [Query("7", "What does <|end|> mean?", "An end.")]}
    with pytest.raises(UserError, match=r"data.forget, row '7': the text has '<\|end\|>' in it"):
        prove(renderer, asked, {})
    allowed = Renderer(renderer.tokenizer, PromptSettings(special_tokens_in_text=True))
    prove(allowed, asked, {})
