"""Damaged start weights: the formula, the same from anywhere, and what it changes of a student's training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from student_jobs import ONE, TINY, assert_resumes_exactly, job, train
from support import LAB_SMALL
from tiny_models import noisy

from duet.cache.errors import UserError
from duet.cache.watch import Watch
from duet.stages.models.identity import weights_sha256
from duet.stages.models.loading import load_model
from duet.stages.settings.student import TrainSettings
from duet.stages.student import noise as noise_file
from duet.stages.student.model import Student
from duet.stages.student.noise import damage, noise_of, scale_of
from duet.stages.student.train import chosen_loss, train_student


def damaged(student_dir: Path, alpha: float = 0.5, **train_settings):
    return replace(job(student_dir, **train_settings), start_noise=alpha)


def tiny(**more):
    config = hf.LlamaConfig(**TINY, attention_bias=True, initializer_range=0.3, **more)
    torch.manual_seed(0)
    return noisy(hf.LlamaForCausalLM(config).float())


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_is_mixed_with_noise_once_and_vectors_stay(tied):
    model, before = tiny(tie_word_embeddings=tied), dict(tiny(tie_word_embeddings=tied).named_parameters())
    damage(dict(model.named_parameters()), 0.25, seed=3)
    found = dict(model.named_parameters())
    assert ("lm_head.weight" in found) != tied
    for name, parameter in found.items():
        if parameter.ndim == 1:
            assert torch.equal(parameter, before[name])
            continue
        noise, scale = (parameter - 0.75 * before[name]) / 0.25, before[name].square().mean().sqrt().item()
        assert torch.allclose(noise, noise_of(name, parameter.shape, scale, 3), atol=1e-5)
        spread = 4 / math.sqrt(2 * noise.numel())  # four standard errors of a standard deviation
        assert abs(noise.std().item() / scale - 1) < spread, name
        assert abs(noise.mean().item()) < 4 * scale / math.sqrt(noise.numel()), name
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_noise_is_a_function_of_name_shape_and_seed_alone():
    shape = torch.Size([6, 4])
    first = noise_of("a", shape, 0.02, 0)
    torch.manual_seed(99)
    noise_of("b", shape, 0.02, 0)
    assert torch.equal(noise_of("a", shape, 0.02, 0), first)
    assert not torch.equal(noise_of("b", shape, 0.02, 0), first)
    assert not torch.equal(noise_of("a", shape, 0.02, 1), first)
    assert first[0, 0].item() == pytest.approx(0.0120565, abs=1e-6), (
        "other noise than before: students that were begun cannot be resumed; say so in CHANGELOG.md"
    )


def test_the_share_of_noise_means_the_same_whatever_the_config_says_of_the_initial_scale():
    """The same weights, ten times as large and with another initializer_range, are damaged to ten times the same."""
    small, large = tiny(), tiny()
    large.config.initializer_range = 0.01
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.mul_(10)
    for model in (small, large):
        damage(dict(model.named_parameters()), 0.5, seed=0)
    for (name, few), many in zip(small.named_parameters(), large.parameters(), strict=True):
        assert torch.allclose(10 * few, many, rtol=1e-4, atol=1e-5), name


def test_the_scale_of_weights_is_their_root_mean_square_in_blocks_too(monkeypatch):
    weights = torch.tensor([[1.0, -2.0, 2.0], [4.0, 0.0, 1.0]])
    assert scale_of(weights) == pytest.approx(math.sqrt(26 / 6))
    monkeypatch.setattr(noise_file, "BLOCK", 4)
    assert scale_of(weights) == pytest.approx(math.sqrt(26 / 6))
    assert scale_of(torch.zeros(2, 2)) == 0.0


def test_a_student_is_damaged_only_where_it_is_asked_for(tmp_path):
    exact = dict(load_model(LAB_SMALL, "float32").named_parameters())
    plain = Student.of(job(tmp_path), "huber_centred", 0, ONE)
    assert all(torch.equal(parameter, exact[name]) for name, parameter in plain.model.named_parameters())
    noised = Student.of(damaged(tmp_path, seed=5), "huber_centred", 0, ONE)
    expected = load_model(LAB_SMALL, "float32")
    damage(dict(expected.named_parameters()), 0.5, seed=5)
    for name, parameter in expected.named_parameters():
        assert torch.equal(dict(noised.model.named_parameters())[name], parameter)


def test_interrupted_and_resumed_is_the_unbroken_run_bit_for_bit(tmp_path, store):
    whole = assert_resumes_exactly(damaged, tmp_path, store)
    assert whole != train(job(tmp_path / "plain"), store)


def test_a_kill_before_the_first_checkpoint_begins_with_the_same_noise(tmp_path, store):
    whole = train(damaged(tmp_path / "whole", checkpoint_steps=100), store)

    class Kill(Exception):
        pass

    def kill(report):
        raise Kill

    broken = damaged(tmp_path / "broken", checkpoint_steps=100)
    with pytest.raises(Kill):
        train_student(broken, {"teacher": store[0]}, store[1], ONE, Watch(on_progress=kill))
    assert train(broken, store) == whole


def test_noise_is_part_of_the_students_identity_only_where_it_is_set(tmp_path, store):
    train(job(tmp_path / "plain", epochs=1), store)
    identity = json.loads((tmp_path / "plain/student.json").read_text())
    assert set(identity) == {"teachers", "start_weights_sha256", "train"}
    assert "start_noise" not in json.loads((tmp_path / "plain/training.json").read_text())
    train(damaged(tmp_path / "noised", epochs=1), store)
    assert json.loads((tmp_path / "noised/student.json").read_text()) == identity | {
        "start_noise": 0.5,
        "noise_scale": "own",
    }
    for name, other, there, now in (
        ("plain", 0.5, "None", "0.5"),
        ("noised", 0.0, "0.5", "None"),
        ("noised", 0.3, "0.5", "0.3"),
    ):
        with pytest.raises(UserError, match=rf"holds another run: start_noise is {there} there and {now} now"):
            train(damaged(tmp_path / name, other, epochs=1), store)


def test_a_student_that_was_begun_with_noise_of_the_initial_scale_is_not_gone_on_with(tmp_path, store):
    train(damaged(tmp_path / "s", epochs=1), store)
    path = tmp_path / "s/student.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "noise_scale"})
    )
    with pytest.raises(UserError, match="holds another run: noise_scale is None there and own now"):
        train(damaged(tmp_path / "s", epochs=1), store)


def test_the_summary_and_the_card_say_the_noise(tmp_path, store):
    train(damaged(tmp_path / "s", epochs=1), store)
    assert json.loads((tmp_path / "s/training.json").read_text())["start_noise"] == 0.5
    assert "damaged: 0.5 of each matrix + 0.5 noise" in (tmp_path / "s/model/README.md").read_text()
    assert train(damaged(tmp_path / "s", epochs=1), store) == []  # read again
    train(job(tmp_path / "plain", epochs=1), store)
    assert "noise" not in (tmp_path / "plain/model/README.md").read_text()


def test_raw_logits_are_not_compared_from_damaged_weights(tmp_path, store):
    start = weights_sha256(LAB_SMALL)
    with_lse = replace(store[0].manifest, provenance=store[0].manifest.provenance | {"weights_sha256": start})
    without = replace(with_lse, logsumexp=False)
    auto = TrainSettings()
    assert chosen_loss(auto, start, [with_lse])[0] == "huber_raw"
    loss, reason = chosen_loss(auto, start, [with_lse, with_lse], 0.5, "mix")
    assert (loss, "damaged" in reason) == ("forward_kl_tail", True)
    assert chosen_loss(auto, start, [with_lse, with_lse], 0.5, "average")[0] == "huber_centred"
    assert chosen_loss(auto, start, [with_lse, without], 0.5, "mix")[0] == "huber_centred"
    assert "offset" in chosen_loss(TrainSettings(loss="huber_raw"), start, [with_lse], 0.5)[1]
    assert chosen_loss(TrainSettings(loss="huber_raw"), start, [with_lse])[1] == "as the settings say"
    assert chosen_loss(TrainSettings(loss="jsd_topk"), start, [with_lse], 0.5)[1] == "as the settings say"
    train(damaged(tmp_path / "s"), store)
    assert json.loads((tmp_path / "s/training.json").read_text())["loss"] == "forward_kl_tail"


def test_settings_that_do_not_go_with_noise_are_refused(tmp_path, store):
    with pytest.raises(UserError, match=r"train.huber_delta does nothing with forward_kl_tail"):
        train(damaged(tmp_path / "s", huber_delta=2.0), store)
    for frozen in ({"lora": {"rank": 2}}, {"last_layers": 1}, {"freeze_embeddings": True}):
        with pytest.raises(UserError, match=rf"student 's'.start_noise with train.{next(iter(frozen))}: the noise"):
            train(damaged(tmp_path / "s", **frozen), store)
    assert not (tmp_path / "s").exists()
