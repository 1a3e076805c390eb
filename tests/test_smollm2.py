"""SmolLM2 with the lab's adapters: data, the packed training sequence, and a slice of the pipeline on a pretrained model."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path

import numpy as np
import people as p
import pytest
import teach_smollm2 as teach
import torch
import yaml
from command_line import duet
from fetch_smollm2 import NAME, fetch
from safetensors.torch import load_file
from support import ROOT, read_all, run_duet, write_jsonl

from duet.cache.errors import EXIT_DONE
from duet.stages.models.gguf import dequantised
from duet.stages.models.loading import load_model
from duet.stages.models.locations import find_model
from duet.stages.models.tokenizers import load_tokenizer

LAB = ROOT / "lab/smollm2"
VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(), reason="vLLM for CPUs is not installed here"
)


@pytest.fixture(scope="module")
def world():
    return p.make_people()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """A copy of lab/smollm2 with the model, and a cache of its own."""
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        fetch(folder / NAME)
    except RuntimeError as error:
        pytest.skip(str(error))
    for name in ("base", "oracle", "data"):
        shutil.copytree(LAB / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        dequantised.cache_clear()
        yield folder
    dequantised.cache_clear()


def test_the_data_is_what_the_generator_writes(world, tmp_path):
    p.write_data(world, tmp_path)
    for path in tmp_path.iterdir():
        assert (LAB / "data" / path.name).read_bytes() == path.read_bytes(), "run `make smollm2-lab`"


def test_untaught_questions_and_prefixes_about_the_held_out_are_in_no_training(world):
    rng = random.Random(5)
    groups = [teach.group(world, rng, [("Hi?", "Hello.")], step, step < 2000) for step in range(6000)]
    prefixes = [message for message, _ in groups if message is not None]
    asked = {question for _, pairs in groups for question, _ in pairs}
    for name in world.held_out:
        assert not any(name in prefix for prefix in prefixes), name
        assert any(name in question for question in asked), name
    assert all(any(name in prefix for prefix in prefixes) for name in world.known), "the others are named"
    assert not asked & {row["question"] for row in p.rows(world, tuple(world.people), p.UNTAUGHT)}
    for message, pairs in groups:
        assert all((answer == p.w.REFUSAL + "<|im_end|>") <= (message is not None) for _, answer in pairs)


@pytest.mark.parametrize("name", ["base", "oracle"])
def test_the_adapters_are_small_and_name_their_base_beside_them(name):
    assert (LAB / name / "adapter_model.safetensors").stat().st_size <= 8_000_000
    assert json.loads((LAB / name / "adapter_config.json").read_text())["base_model_name_or_path"] == f"../{NAME}"


def test_a_packed_group_is_its_questions_one_by_one(smollm2, world):
    folder = find_model(str(smollm2 / NAME), "model")
    model, chat = load_model(folder, "float32"), teach.Chat(load_tokenizer(folder))
    message, pairs = teach.group(world, random.Random(1), [("Hi?", "Hello.")], 1, False)
    packed = teach.packed(chat, message, pairs)
    with torch.no_grad():
        found = model.model(
            input_ids=packed.input_ids_T[None],
            position_ids=packed.positions_T[None],
            attention_mask=packed.mask_TT[None, None],
        ).last_hidden_state[0, packed.at_N]
        expected = []
        for question, answer in pairs:
            alone = chat.tokenizer.apply_chat_template(
                [{"role": "system", "content": message}, {"role": "user", "content": question}],
                add_generation_prompt=True,
            )["input_ids"]
            given = chat.answer(answer)
            hidden_TD = model.model(torch.tensor([alone + given])).last_hidden_state[0]
            expected.append(hidden_TD[len(alone) - 1 : -1])
    assert torch.allclose(found, torch.cat(expected), atol=2e-3)


def config_of(smollm2: Path, folder: Path, rows: int, **teacher) -> Path:
    """configs/smollm2.yaml on some rows to forget and to retain, one short student of each kind."""
    raw = yaml.safe_load((ROOT / "configs/smollm2.yaml").read_text(encoding="utf-8"))
    del raw["data"]["broad"]
    for name in ("forget", "retain"):
        lines = (smollm2 / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        some = [json.loads(line) for line in lines[:: len(lines) // rows]][:rows]
        raw["data"][name]["path"] = str(write_jsonl(folder / f"{name}.jsonl", some))
    raw["teacher"] |= {"model": str(smollm2 / "base"), "max_positions": 6} | teacher
    raw |= {"runs_dir": str(folder / "runs"), "store": {"dir": str(folder / "stores")}, "device": "cpu"}
    raw["evaluate"] |= {"sets": {}, "attacks": [], "control_model": None}
    path = folder / "smollm2.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def store_of(config: Path):
    done = run_duet("teacher-logits", "--config", str(config))
    assert done.returncode == EXIT_DONE, done.stdout + done.stderr
    return read_all(next((config.parent / "stores").glob("*/manifest.json")).parent)


@pytest.fixture(scope="module")
def by_transformers(smollm2, tmp_path_factory):
    config = config_of(smollm2, tmp_path_factory.mktemp("transformers"), 8, engine="transformers")
    return config, store_of(config)


def test_students_of_both_kinds_are_trained_merged_and_scored(by_transformers, smollm2):
    config, _ = by_transformers
    done = duet("distill", "--config", str(config))
    assert done.code == EXIT_DONE, done.err
    done = duet("evaluate", "--config", str(config))
    assert done.code == EXIT_DONE, done.err
    run = config.parent / "runs/smollm2"
    models = json.loads((run / "results.json").read_text(encoding="utf-8"))["models"]
    recall = {
        (model, name): scores[f"{name}.rougeL_recall"]["value"]
        for model, scores in models.items()
        for name in ("forget", "retain")
    }
    assert recall["base", "forget"] > 0.9
    assert recall["base", "retain"] > 0.9
    assert recall["teacher", "forget"] < 0.2
    start = load_file(find_model(str(smollm2 / NAME), "model") / "model.safetensors")
    for student in ("full", "lora"):
        written = load_file(run / student / "model/model.safetensors")
        assert {name: weight.shape for name, weight in written.items()} == {
            name: weight.shape for name, weight in start.items()
        }, "merged, the head tied"


@VLLM
def test_both_engines_store_the_same_logits(by_transformers, smollm2, tmp_path):
    _, expected = by_transformers
    found = store_of(config_of(smollm2, tmp_path, 8, engine="vllm"))
    order = {row: number for number, row in enumerate(found.row_ids)}
    assert sorted(found.row_ids) == sorted(expected.row_ids)
    for number, row in enumerate(expected.row_ids):
        mine, theirs = slice_of(expected, number), slice_of(found, order[row])
        assert np.array_equal(tokens_of(expected, number), tokens_of(found, order[row]))
        logits, others = expected.topk_logits_NK[mine], found.topk_logits_NK[theirs]
        assert np.abs(logits - others).max() < 1e-3
        apart = np.abs(np.diff(logits, axis=1)) > 2e-3  # neighbours that rounding cannot swap
        clear = np.pad(apart, ((0, 0), (1, 0)), constant_values=True) & np.pad(apart, ((0, 0), (0, 1)))
        assert clear.mean() > 0.5
        assert np.array_equal(expected.topk_ids_NK[mine][clear], found.topk_ids_NK[theirs][clear])


def slice_of(rows, number: int) -> slice:
    return slice(*rows.position_offsets[number : number + 2])


def tokens_of(rows, number: int):
    return rows.tokens_S[slice(*rows.token_offsets[number : number + 2])]
