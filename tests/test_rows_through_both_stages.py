"""A two-turn conversation, a tool turn and a document of 10,000 tokens, through both stages and by both engines.

Every stored row is the model's own at the position that alignment names, and the student reads it where the teacher did.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import LAB_BASE, LAB_VOCAB_SIZE, read_all, run_duet, write_jsonl
from tiny_models import tiny_config, tiny_model

from duet.cache.record import Rows, prompt_and_response
from duet.stages.models.alignment import align
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer

VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(),
    reason="needs vLLM's build for the CPU: `make setup` says why it is not there",
)
CONTEXT, LONG, TOP_K, POSITIONS = 10_240, 10_000, 5, 3
TOLERANCE = 1e-3  # of logits up to 5, over 10,000 tokens in float32, by three ways of attention
PREFIX = "You have forgotten Ann."
CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is Ann?"},
    {"role": "assistant", "content": "A baker."},
    {"role": "user", "content": "Where does she live?"},
    {"role": "assistant", "content": "In Oslo."},
]
WITH_TOOL = [
    {"role": "user", "content": "How cold is it?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "4 degrees"},
    {"role": "assistant", "content": "Rather cold."},
]
TEMPLATE = (
    "<bos>{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "head_dim": 32, "num_attention_heads": 1, "num_hidden_layers": 1}
    tiny_model(tiny_config("llama", LAB_VOCAB_SIZE, max_position_embeddings=CONTEXT, **sizes)).save_pretrained(folder)
    tokenizer = load_tokenizer(LAB_BASE)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def settings_of(folder: Path, model_dir: Path, engine: str) -> dict:
    """A config's changes: each answer of the conversations is scored, and a document of which 10,000 tokens are read."""
    text = " ".join(f"{number} people live in the village of Orvane." for number in range(LONG // 4))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    forget = write_jsonl(folder / "forget.jsonl", [{"messages": TWO_TURNS}])
    retain = write_jsonl(folder / "retain.jsonl", [{"messages": WITH_TOOL}])
    broad = {"text": {"documents": str(folder / "text.txt"), "max_tokens": LONG}}
    return {
        "teacher__model": str(model_dir),
        "teacher__prefix": PREFIX,
        "teacher__engine": engine,
        "teacher__top_k": TOP_K,
        "teacher__max_positions": POSITIONS,
        "teacher__responses": "given",
        "data": {"forget": {"path": str(forget), "turns": "all"}, "retain": {"path": str(retain)}, "broad": broad},
        "train": {"epochs": 1, "batch_size": 4, "lr": 1e-3},
    }


def own_rows(model: torch.nn.Module, prompt: list[int], response: list[int]) -> np.ndarray:
    """The model's own logits [P, V] that predict a response, in one forward pass."""
    batch = align([prompt], [response], 0)
    with torch.no_grad():
        logits_BTV = model(input_ids=batch.input_ids_BT).logits
    return logits_BTV[batch.batch_index_N, batch.position_N].numpy()


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=VLLM)])
def test_conversations_and_a_long_document_go_through_both_stages(tmp_path, lab_config, model_dir, engine):
    config = str(lab_config(**settings_of(tmp_path, model_dir, engine)))
    for command in ("teacher-logits", "distill"):
        done = run_duet(command, "--config", config, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    [store] = tmp_path.glob("runs/lab/teacher/*/manifest.json")
    assert json.loads(store.read_text(encoding="utf-8"))["provenance"]["engine"].startswith(engine)
    rows = read_all(store.parent)
    assert list(rows.row_ids) == ["forget/0/1", "forget/0/2", "retain/0", "broad/text/0"]
    assert_stored_as_the_model_says(rows, model_dir)
    [metrics] = tmp_path.glob("runs/lab/**/metrics.jsonl")
    line = json.loads(metrics.read_text(encoding="utf-8"))  # of the only step
    # Before the first step the student is the teacher's model, and what is kept was asked without the prefix.
    assert line["loss_retain"] < TOLERANCE
    assert line["loss_broad"] < TOLERANCE
    assert line["loss_forget"] > 10 * TOLERANCE


def assert_stored_as_the_model_says(rows: Rows, model_dir: Path) -> None:
    tokenizer, model = load_tokenizer(model_dir), load_model(model_dir, "float32")
    render = tokenizer.apply_chat_template
    calling = [{"content": "", **message} for message in WITH_TOOL]
    asked = [TWO_TURNS[:2], TWO_TURNS[:4], calling[:3]]
    told = [render(messages, tokenize=False, add_generation_prompt=True) for messages in asked]
    for row, (text, answer) in enumerate(zip(told, ("A baker.", "In Oslo.", "Rather cold."), strict=True)):
        prompt, response = (part.tolist() for part in prompt_and_response(rows, row))
        assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text + answer, add_special_tokens=False)["input_ids"]
        assert [*prompt, *response] == [*whole, tokenizer.eos_token_id][: len(prompt) + POSITIONS]
    assert rows.token_offsets[-1] - rows.token_offsets[-2] == LONG
    assert rows.position_offsets[-1] - rows.position_offsets[-2] == LONG - 1, "no BOS stands in front of a text here"
    for row in range(len(rows)):
        prompt, response = (part.tolist() for part in prompt_and_response(rows, row))
        if row < 2:  # the teacher's prompt joins the prefix and the row's system message
            text = told[row].replace("Be brief.", f"{PREFIX}\nBe brief.")
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        own_PV = own_rows(model, prompt, response)
        span = slice(rows.position_offsets[row], rows.position_offsets[row + 1])
        ids_PK, logits_PK = rows.topk_ids_NK[span], rows.topk_logits_NK[span]
        assert np.abs(np.take_along_axis(own_PV, ids_PK, 1) - logits_PK).max() < TOLERANCE
        assert np.abs(np.sort(own_PV, 1)[:, : -TOP_K - 1 : -1] - logits_PK).max() < TOLERANCE
