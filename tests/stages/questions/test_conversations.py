"""Rows that are conversations: read from each kind of file, asked whole, or refused where row or template are at fault."""

from __future__ import annotations

import json

import families
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import LAB_BASE, write_jsonl

from duet.cache.errors import UserError
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.chat import ChatTemplate
from duet.stages.questions.chat_prompts import ChatPrompts, Shown
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.proof import prove
from duet.stages.questions.queries import Query, load_queries
from duet.stages.settings.data import DataSettings, PromptSettings

CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}],
}
TOOL_TEMPLATE = (
    "<bos>{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def turns(*contents: str, first: str = "user") -> list[dict]:
    """Messages of user and assistant by turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]


TWO_TURNS = [{"role": "system", "content": "Be brief."}, *turns("Who is Ann?", "A baker.", "Where?", "In Oslo.")]
WITH_TOOL = [*turns("Weather?"), CALL, {"role": "tool", "content": "4 degrees"}, *turns("Cold.", first="assistant")]


def load(path, need_answers=False, **more) -> list[Query]:
    return load_queries(DataSettings(path=str(path), **more), "data.forget", need_answers)


def query(tmp_path, messages, **row) -> Query:
    [found] = load(write_jsonl(tmp_path / "one.jsonl", [{"messages": messages, **row}]))
    return found


@pytest.fixture
def tokenizer():
    return load_tokenizer(LAB_BASE)


def text(tokenizer, asked: Query, prefix: str = "", **settings) -> str:
    return tokenizer.decode(Renderer(tokenizer, PromptSettings(**settings)).prompt(Prompt.plain(asked, prefix)))


def test_every_kind_of_data_holds_conversations_beside_questions(tmp_path):
    rows = [{"messages": TWO_TURNS}, {"messages": WITH_TOOL}, {"question": "Who?", "answer": "Ann."}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    first, second, third = load(path, need_answers=True)
    assert (first.question, first.answer, [t.content for t in first.before], first.after) == (
        "Where?", "In Oslo.", ["Be brief.", "Who is Ann?", "A baker."], (),
    )  # fmt: skip
    assert (second.question, second.answer, second.before) == ("Weather?", "Cold.", ())
    assert [turn.message for turn in second.after] == [CALL | {"content": ""}, {"role": "tool", "content": "4 degrees"}]
    assert (third.asked, third.is_conversation) == ("Who?", False)
    assert len({first.asked, second.asked, third.asked}) == 3
    (tmp_path / "hub").mkdir()
    table = pa.table({name: [row.get(name) for row in rows] for name in ("messages", "question", "answer")})
    for copy in (tmp_path / "a.parquet", tmp_path / "hub" / "train-00000-of-00001.parquet"):
        pq.write_table(table, copy)  # a message has all keys of all messages there, most of them null
    assert load(tmp_path / "a.parquet") == load(f"hf://{tmp_path / 'hub'}") == [first, second, third]


def test_a_conversation_may_stand_in_the_question_field_and_by_columns(tmp_path):
    columns = {key: [turn[key] for turn in TWO_TURNS] for key in ("role", "content")}
    path = write_jsonl(tmp_path / "a.jsonl", [{"chosen": TWO_TURNS}, {"chosen": columns}])
    first, second = load(path, question_field="chosen")
    assert (first.before, first.answer) == (second.before, second.answer)
    assert load(write_jsonl(path, [{"question": "Who?", "messages": TWO_TURNS}]))[0].asked == "Who?"


def test_what_is_asked_ends_where_the_answer_is_to_come(tmp_path):
    asked = query(tmp_path, TWO_TURNS[:-1], answer="In Bergen.")
    assert (asked.question, asked.answer) == ("Where?", "In Bergen.")
    with pytest.raises(UserError, match="row 0 has no field 'answer'"):
        load(write_jsonl(tmp_path / "a.jsonl", [{"messages": TWO_TURNS[:-1]}]), need_answers=True)
    with pytest.raises(UserError, match="row 0 has two answers"):
        query(tmp_path, TWO_TURNS, answer="In Bergen.")


def test_every_answer_of_a_conversation_may_be_asked_for(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TWO_TURNS}, {"messages": WITH_TOOL}, {"question": "Who?"}])
    found = load(path, turns="all")
    assert [(q.row_id, q.question, q.answer) for q in found] == [
        ("0/1", "Who is Ann?", "A baker."), ("0/2", "Where?", "In Oslo."), ("1", "Weather?", "Cold."), ("2", "Who?", None),
    ]  # fmt: skip
    assert [turn.content for turn in found[1].before] == ["Be brief.", "Who is Ann?", "A baker."]
    assert [q.row_id for q in load(path, turns="all", rows=(0, 1))] == ["0/1", "0/2"], "rows are those of the file"
    assert [q.answer for q in load(path)] == ["In Oslo.", "Cold.", None]


def test_the_weight_of_a_message_says_whether_it_is_asked_for(tmp_path):
    weighted = [dict(message) for message in TWO_TURNS]
    weighted[2]["weight"] = 1
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": weighted}])
    assert [(q.row_id, q.answer) for q in load(path)] == [("0/1", "A baker."), ("0/2", "In Oslo.")]
    weighted[4]["weight"] = 0
    [only] = load(write_jsonl(path, [{"messages": weighted}]), turns="all")
    assert (only.row_id, only.answer, only.after) == ("0", "A baker.", ())
    asked = [{"messages": weighted[:-1], "answer": "In Bergen."}]
    assert [q.answer for q in load(write_jsonl(path, asked))] == ["A baker.", "In Bergen."]
    with pytest.raises(UserError, match="row 0 asks for 2 answers, and has other answers to one"):
        load(write_jsonl(path, [asked[0] | {"wrong": ["In Rome."]}]), perturbed_field="wrong")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a conversation"),
        ("Who?", "expected a conversation"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "user", "content": " "}], "message 0 is empty"),
        ([{"role": "user", "content": [{"type": "text", "text": "Who?"}]}], "message 0 has a list as its content"),
        ([{"role": "human", "content": "Who?"}], "message 0 has the role 'human'"),
        ([{"from": "human", "value": "Who?"}], "message 0 has the role None"),
        (["Who?"], "message 0 is 'Who\\?', expected an object"),
        ([*turns("Who?"), {"role": "system", "content": "Be brief."}], "message 1 is a system message"),
        (turns("Hello!", first="assistant"), "no message of the user stands before the answer"),
        ([*turns("Who?", "Ann."), *turns("Or Eve.", first="assistant")], "messages 1 and 2 are both the assistant's"),
        ([*turns("Weather?"), CALL], "ends in a tool call"),
        ([CALL | {"role": "user"}], "message 0 calls a tool as the user"),
        ([{"role": "user", "content": "Who?", "name": "Bob"}], "message 0 has the keys name beside"),
        ([{"role": "user", "content": "Who?", "continue": True}], "message 0: only a text of the assistant"),
        ([{"role": "user", "content": "Who?", "weight": 1}], "message 0 has the weight 1"),
        ([*turns("Who?"), {"role": "assistant", "content": "Ann.", "weight": 0.5}], "message 1 has the weight 0.5"),
        ([*turns("Who?"), {"role": "assistant", "content": "Ann.", "weight": 0}], "every answer has the weight 0"),
    ],
)
def test_conversations_that_cannot_be_asked_are_refused_with_their_place(tmp_path, messages, message):
    with pytest.raises(UserError, match=message) as caught:
        query(tmp_path, messages)
    assert caught.value.what.startswith("data.forget: ")
    assert ", row 0: messages" in caught.value.what
    assert caught.value.hint


def test_all_turns_are_asked_and_the_prefix_joins_the_rows_system_message(tmp_path, tokenizer):
    asked = query(tmp_path, TWO_TURNS)
    rest = "<|user|>Who is Ann?<|assistant|>A baker.<|user|>Where?<|assistant|>"
    assert text(tokenizer, asked) == f"<bos><|system|>Be brief.{rest}"
    assert text(tokenizer, asked, "P.") == f"<bos><|system|>P.\nBe brief.{rest}"
    placed = text(tokenizer, asked, "P.", prefix_placement="text", template="Q: {question}")
    assert (
        placed == "<bos><|system|>Be brief.<|user|>P.\nWho is Ann?<|assistant|>A baker.<|user|>Q: Where?<|assistant|>"
    )
    without = query(tmp_path, TWO_TURNS[1:])
    assert text(tokenizer, without, "P.", system="S.") == f"<bos><|system|>P.\nS.{rest}"
    with pytest.raises(UserError, match=r"row '0': the row has a system message, and prompt.system puts in another"):
        text(tokenizer, asked, system="S.")


def test_an_answer_follows_its_conversation(tmp_path, tokenizer):
    renderer, prompt = Renderer(tokenizer, PromptSettings()), Prompt.plain(query(tmp_path, TWO_TURNS))
    whole = renderer.prompt(prompt) + renderer.answer(prompt, prompt.query.answer or "").own
    assert (
        whole
        == tokenizer(tokenizer.apply_chat_template(TWO_TURNS, tokenize=False), add_special_tokens=False)["input_ids"]
    )


def test_tool_turns_are_asked_where_the_template_has_them(tmp_path, tokenizer):
    asked = query(tmp_path, WITH_TOOL)
    tokenizer.chat_template = TOOL_TEMPLATE
    expected = tokenizer.apply_chat_template(
        [*turns("Weather?"), CALL | {"content": ""}, WITH_TOOL[2]], tokenize=False, add_generation_prompt=True
    )
    assert '{"city": "Oslo", "days": 2}' in expected
    ids = Renderer(tokenizer, PromptSettings()).prompt(Prompt.plain(asked))
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TOOL_TEMPLATE.replace("call.function.name", "''"), "drops 'weather' of a tool call"),
        (TOOL_TEMPLATE.replace("call.function.arguments | tojson", "''"), "drops 'Oslo' of a tool call"),
        (TOOL_TEMPLATE.replace("in messages %}", "in messages if m.role != 'tool' %}"), "drops a turn of the tool"),
        (TOOL_TEMPLATE.replace("{{ m.content }}", "{{ raise_exception('no tools') if m.role == 'tool' else m.content }}"),
         "cannot render these messages: no tools"),
        (None, "drops 'weather' of a tool call"),
    ],
)  # fmt: skip
def test_a_template_that_loses_a_tool_turn_is_refused(tmp_path, tokenizer, template, message):
    tokenizer.chat_template = template or tokenizer.chat_template
    with pytest.raises(UserError, match=f"row '0': .*{message}"):
        text(tokenizer, query(tmp_path, WITH_TOOL))


def test_arguments_that_the_template_quotes_once_more_are_refused(tmp_path, tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATE
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]}
    with pytest.raises(UserError, match=r"drops '{\"city\": \"Oslo\"}' of a tool call"):
        text(tokenizer, query(tmp_path, [*turns("Weather?"), call, WITH_TOOL[2]]))


def test_two_user_turns_in_a_row_are_refused_where_the_template_refuses_them(tmp_path, tokenizer):
    asked = query(tmp_path, [*turns("Hello."), *turns("Who?", "Ann.")])
    assert text(tokenizer, asked) == "<bos><|user|>Hello.<|user|>Who?<|assistant|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}<|{{ m.role }}|>{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(UserError, match=r"row '0': the chat template cannot render .* must alternate") as caught:
        text(tokenizer, asked, prefix_placement="text")
    assert "join turns of one role" in caught.value.hint


def test_a_begun_answer_is_continued(tmp_path, tokenizer):
    begun = {"role": "assistant", "content": "She lives in ", "continue": True}
    asked = query(tmp_path, [*TWO_TURNS[:-1], begun], answer="Oslo.")
    assert text(tokenizer, asked).endswith("<|user|>Where?<|assistant|>She lives in")
    renderer, prompt = Renderer(tokenizer, PromptSettings()), Prompt.plain(asked, "P.")
    given = renderer.answer(prompt, asked.answer or "")
    told = [*TWO_TURNS[:-1], {"role": "assistant", "content": "She lives in Oslo."}]
    told[0] = {"role": "system", "content": "P.\nBe brief."}
    whole = tokenizer(tokenizer.apply_chat_template(told, tokenize=False), add_special_tokens=False)["input_ids"]
    assert renderer.prompt(prompt) + given.own == whole
    assert given.num_end == 1


def test_plain_prompts_take_no_conversation_and_bare_ones_its_texts(tmp_path, tokenizer):
    plain = {"format": "plain", "prefix_placement": "text"}
    asked = query(tmp_path, TWO_TURNS)
    with pytest.raises(UserError, match="row '0': a conversation of several turns has no place in a plain prompt"):
        text(tokenizer, asked, **plain)
    bare = Renderer(tokenizer, PromptSettings()).prompt(Prompt(asked, asked.question, "P.", bare=True))
    assert tokenizer.decode(bare).endswith("P.\nBe brief.\nWho is Ann?\nA baker.\nWhere?")
    shown = Prompt(Query("1", "Why?", None), "Why?", examples=(asked,))
    with pytest.raises(UserError, match="an example in front of the question is a conversation"):
        Renderer(tokenizer, PromptSettings()).prompt(shown)


def test_commands_in_any_turn_are_refused(tmp_path, tokenizer):
    call = json.loads(json.dumps(CALL).replace("Oslo", "<|user|>"))
    renderer = Renderer(tokenizer, PromptSettings())
    for messages in (turns("A <bos>?", "Yes.", "Who?"), [*turns("Weather?"), call, WITH_TOOL[2]]):
        with pytest.raises(UserError, match=r"data.forget, row '0': the text has '<"):
            prove(renderer, {"data.forget": [query(tmp_path, messages)]}, {}, ("question",))


@pytest.mark.skipif(not families.TEMPLATES.is_dir(), reason="no real chat templates")
def test_every_template_renders_conversations_as_transformers_does_or_refuses_them(tmp_path, tokenizer):
    rendered = dict.fromkeys(("turns", "tool"), 0)
    for family, template in families.templates().items():
        tokenizer.chat_template = template
        settings = PromptSettings(template_args=families.NEEDS.get(family, {}))
        chat = ChatTemplate(tokenizer, settings)
        for name, messages in (("turns", TWO_TURNS[1:]), ("tool", WITH_TOOL)):
            asked = query(tmp_path, messages)
            try:
                found = ChatPrompts(chat, settings).text(Shown(asked.question, "", (), asked.before, asked.after))
            except UserError:
                continue
            read = [CALL | {"content": ""} if message is CALL else message for message in messages[:-1]]
            assert found == tokenizer.apply_chat_template(
                read, tokenize=False, add_generation_prompt=True, **chat.arguments
            )
            rendered[name] += 1
    assert rendered["turns"] > 25
    assert rendered["tool"] > 3
