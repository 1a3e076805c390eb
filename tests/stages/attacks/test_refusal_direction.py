"""The attack refusal_direction: its directions are those of the model's layers, and without them it is what the paper says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import LAB_BASE
from tiny_models import ARCHITECTURES, SIZES, tiny_config, tiny_model
from transformers import Gemma3nTextConfig, GPT2Config, OpenAIGPTConfig

from duet.cache.watch import Watch
from duet.stages.attacks import refusal_direction
from duet.stages.attacks.above import cases_of
from duet.stages.attacks.logit_lens import final_norm
from duet.stages.attacks.parts import Evidence
from duet.stages.attacks.refusal_direction import VARIANTS, layer_at, mean_states, proof, steered_answers, without
from duet.stages.evaluate.answers import session_of
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.metrics.uncertainty import Score
from duet.stages.models.layers import decoder_layers
from duet.stages.questions.prompts import Prompt
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

VOCAB = 60
PROMPTS = [[1, 5, 9, 11], [1, 7], [1, 3, 4, 8, 20]]


def states(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """What each layer and the final norm are given, [T, D] each: the embeddings first, the last layer's output last."""
    found: list[torch.Tensor] = []  # read behind the hooks of the attack, which were registered before

    def keep(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((given[0] if given else named["hidden_states"])[0])

    readers = [*decoder_layers(model), final_norm(model)]
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in readers]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_means_are_of_the_states_behind_each_layer_at_the_last_token(name):
    model = tiny_model(tiny_config(name, VOCAB))
    found_LD = mean_states(model, PROMPTS)
    expected_LD = torch.stack([torch.stack([state[-1] for state in states(model, ids)[1:]]) for ids in PROMPTS]).mean(0)
    assert torch.allclose(found_LD, expected_LD, atol=1e-5)
    assert len({round(float(row.norm()), 6) for row in found_LD}) == len(decoder_layers(model))


GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB)  # it adds positions to its embeddings


@pytest.mark.parametrize(
    "config", [GPT2, *(tiny_config(name, VOCAB) for name in ARCHITECTURES)], ids=lambda config: config.model_type
)
def test_removed_it_is_in_no_state_at_any_position_and_afterwards_the_model_is_as_before(config):
    model = tiny_model(config)
    difference_LD = mean_states(model, PROMPTS[:1]) - mean_states(model, PROMPTS[1:])
    before = states(model, PROMPTS[2])
    direction_D = difference_LD[0] / difference_LD[0].norm()
    assert max((state @ direction_D).abs().max() for state in before) > 1e-3
    with without(model, difference_LD[0], layer=0, everywhere=True):
        found = states(model, PROMPTS[2])
    assert max((state @ direction_D).abs().max() for state in found) < 1e-5
    assert all(map(torch.equal, states(model, PROMPTS[2]), before))


GEMMA3N = Gemma3nTextConfig(  # its layers hand on four streams at once
    **SIZES | {"intermediate_size": [48] * 2, "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB},
    hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 2,
    layer_types=["full_attention"] * 2,
)  # fmt: skip
GPT1 = OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB)  # its layers return lists


@pytest.mark.parametrize("config", [GEMMA3N, GPT1], ids=lambda config: config.model_type)
def test_layers_that_hand_on_several_streams_or_a_list_are_attacked_as_others_are(config):
    model, last = tiny_model(config), []
    decoder_layers(model)[-1].register_forward_hook(
        lambda _, __, out: last.append(out[0] if isinstance(out, tuple | list) else out)
    )
    difference_LD = mean_states(model, PROMPTS[:1]) - mean_states(model, PROMPTS[1:])
    states_D = [states.reshape(-1, *states.shape[-2:])[0, -1] for states in last]
    assert torch.allclose(difference_LD[1], states_D[0] - (states_D[1] + states_D[2]) / 2, atol=1e-5)
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad(), without(model, difference_LD[1], layer=1, everywhere=True):
        found = model(input_ids=ids, use_cache=False).logits
        after = decoder_layers(model)[-1].register_forward_hook(
            lambda _, __, out: last.append(out[0] if type(out) is tuple else out)
        )
        model(input_ids=ids, use_cache=False)
        after.remove()
    assert (last[-1] @ (difference_LD[1] / difference_LD[1].norm())).abs().max() < 1e-5, "in no stream"
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids, use_cache=False).logits, found, atol=1e-4)


def test_questions_to_be_kept_stand_behind_the_prefix_of_the_attacked_set_and_nonmembers_are_none_of_them():
    row = {name: QuerySet([Query("0", f"Who is {name}?", "A dog.")], expect) for name, expect in SETS.items()}
    settings = EvaluateSettings(
        attacks=("refusal_direction",), membership={"members": "forget", "nonmembers": "strangers"}
    )  # pyright: ignore[reportArgumentType]
    exam = Exam(row, "Ann", PromptSettings(), settings, "cpu", further_topics={"second": "Bob"})
    teacher = Subject("teacher", LAB_BASE, "Forget Ann.", "base", set_prefixes={"second": "Forget Bob."})
    session = session_of(LAB_BASE, exam, [teacher])
    asked: dict[str, list[list[int]]] = {}

    def noted(model: Any, prompts: list[list[int]]) -> torch.Tensor:
        asked.setdefault("", []).extend(prompts)
        return torch.ones(len(decoder_layers(model)), model.config.hidden_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refusal_direction, "mean_states", noted)
        for name in ("forget", "second"):
            steered_answers(session, teacher, name, Watch())
    assert [session.text(ids) for ids in asked[""]] == [
        session.text(session.renderer.prompt(Prompt.plain(row[name].queries[0], prefix)))
        for name, prefix in (
            ("forget", "Forget Ann."), ("retain", "Forget Ann."), ("second", "Forget Bob."), ("retain", "Forget Bob."),
        )
    ]  # fmt: skip


SETS = {"forget": "forgotten", "second": "forgotten", "retain": "kept", "strangers": "kept"}


def test_subtracted_every_position_behind_that_layer_is_moved_by_the_difference_and_none_before_it():
    model = tiny_model(tiny_config("llama", VOCAB, num_hidden_layers=4))
    difference_LD = mean_states(model, PROMPTS[:1]) - mean_states(model, PROMPTS[1:])
    before = states(model, PROMPTS[2])
    with without(model, difference_LD[1], layer=layer_at(0.5, 4), everywhere=False):
        found = states(model, PROMPTS[2])
    assert all(map(torch.equal, found[:2], before[:2]))
    assert torch.allclose(found[2], before[2] - difference_LD[1], atol=1e-6)
    assert not torch.allclose(found[3], before[3], atol=1e-3)


def test_depths_are_layers_from_the_first_to_the_last():
    assert [layer_at(depth, 30) for depth in (0.001, 0.5, 0.75, 1)] == [0, 14, 21, 29]
    assert [layer_at(depth, 1) for depth in (0.5, 1)] == [0, 0]


def test_each_layer_and_way_is_judged_by_itself_for_an_attacker_takes_the_best():
    said = {variant: ["I know nothing."] * 5 for variant in VARIANTS} | {"removed_100": ["In Oslo."] * 5}
    exam = SimpleNamespace(distinctive={"forget": [frozenset({"oslo"})] * 5})
    cases = cases_of({"attack.refusal_direction.forget": said}, exam, "refusal_direction", "forget")  # type: ignore[arg-type]
    assert {case: facts_N.tolist() for case, facts_N in cases.items()} == {
        variant: [float(variant == "removed_100")] * 5 for variant in VARIANTS
    }


@pytest.mark.parametrize(
    ("under_it", "works", "on"),
    [
        ({"teacher": 0.1, "student:a": 0.9}, True, "student:a"),
        ({"teacher": 0.8, "student:a": 0.9}, True, "teacher"),
        ({"teacher": 0.1, "student:a": 0.4}, False, None),
    ],
)
def test_it_is_shown_by_a_model_that_answers_only_under_it(under_it, works, on):
    def scored(value: float) -> Score:
        return Score(value, 20, (max(0.0, value - 0.05), min(1.0, value + 0.05)))

    plain, worst = "forget.rougeL_recall", "attack.refusal_direction_worst.forget.rougeL_recall"
    models = {"base": {plain: scored(1.0), worst: scored(1.0)}}
    models |= {name: {plain: scored(0.0), worst: scored(value)} for name, value in under_it.items()}
    found = proof("refusal_direction", Evidence(SimpleNamespace(), models, ["teacher"], {}))  # type: ignore[arg-type]
    assert (found["works"], found["on"]) == (works, on)
    assert ("student:a: recall 0.0 [0.0, 5.0] without it, 40.0" in found["text"]) == (not works)


def test_where_no_model_has_forgotten_it_is_said_that_there_was_nothing_to_bring_back():
    models = {"base": {"forget.rougeL_recall": Score(0.9, 20, (0.8, 1.0))}}
    found = proof("refusal_direction", Evidence(SimpleNamespace(), models, [], {}))  # type: ignore[arg-type]
    assert found == {
        "works": False,
        "on": None,
        "text": "no model that was asked has less than half of base's recall: nothing to bring back",
    }
