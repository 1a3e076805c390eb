"""What was run: hashes that change with what they are of, every seed, and no place of this machine."""

from __future__ import annotations

import hashlib
import json
import shutil

from support import LAB_BASE, ROOT, flip_byte, write_jsonl

from duet.cache.files import sha256_json
from duet.pipeline.config.load import load_config
from duet.pipeline.run.exam import exam_of
from duet.pipeline.run.provenance import provenance, without_places
from duet.stages.exam.exam import Subject
from duet.stages.models.identity import weights_sha256

SUBJECTS = [
    Subject("base", LAB_BASE, "", "base"),
    Subject("teacher", LAB_BASE, "Forget.", "base", {"second.forget": "That, too."}),
]


def test_data_weights_and_prefixes_are_hashed(lab_config, tmp_path):
    rows = [{"id": "1", "question": "Who?", "answer": "Me."}, {"id": "2", "question": "Where?", "answer": "Here."}]

    def told(answer: str) -> dict:
        path = write_jsonl(tmp_path / "forget.jsonl", [rows[0], rows[1] | {"answer": answer}])
        config = load_config(str(lab_config(data__forget__path=str(path), device="cpu")))
        return provenance(config, SUBJECTS, exam_of(config))

    found = told("Here.")
    assert found["data"]["forget"] == {
        "rows": 2,
        "sha256": sha256_json([["1", "Who?", "Me."], ["2", "Where?", "Here."]]),
    }
    assert told("There.")["data"]["forget"] != found["data"]["forget"]
    assert told("There.")["data"]["retain"] == found["data"]["retain"]
    weights = weights_sha256(LAB_BASE)
    assert found["models"] == {
        "base": {"weights_sha256": weights},
        "teacher": {
            "weights_sha256": weights,
            "prefix_sha256": hashlib.sha256(b"Forget.").hexdigest(),
            "prefix_sha256 of second.forget": hashlib.sha256(b"That, too.").hexdigest(),
        },
    }
    assert found["config_sha256"] == sha256_json(found["config"])
    for place in (ROOT, tmp_path):
        assert str(place) not in json.dumps(found)


def test_every_seed_is_named(lab_config):
    students = [{"name": "a"}, {"name": "b", "train": {"seed": 7}}]
    config = load_config(
        str(lab_config(students=students, evaluate__seed=5, teacher__temperature=1.0, teacher__seed=9)),
        ("train.seed=3",),
    )
    found = provenance(config, SUBJECTS, exam_of(config))["seeds"]
    assert found == {"teacher": 9, "student:a": 3, "student:b": 7, "evaluate": 5}
    drawn = load_config(str(lab_config(teacher__ids="sampled", teacher__seed=4)))
    assert provenance(drawn, SUBJECTS, exam_of(drawn))["seeds"]["teacher"] == 4


def test_the_cluster_is_not_told(lab_config):
    config = load_config(str(lab_config(slurm__account="forgetting", slurm__setup=["export HF_HOME=/home/me/hf"])))
    assert "forgetting" in str(config)
    found = str(provenance(config, SUBJECTS, exam_of(config)))
    assert "forgetting" not in found
    assert "/home/me" not in found


def test_every_setting_that_is_a_place_loses_where_it_lies(lab_config):
    """All of them, wherever they stand: the last name stays, and a text or a name of the run does, too."""
    evaluate = {
        "models": {"npo": "/secret/npo"},
        "control_model": "/secret/oracle",
        "attack_texts": "/secret/texts.yaml",
        "neutral_text": "/secret/neutral.txt",
        "lm_eval": [{"task": "mmlu", "num_fewshot": 0}],
        "lm_eval_dir": "/secret/tasks",
        "membership": {
            "members": "forget",
            "nonmembers": "retain",
            "reference_model": "/secret/reference",
            "retrained": "/secret/results.json",
        },
        "tofu": {"forget": "forget", "reference": "/secret/TOFU_EVAL.json", "reference_model": "base"},
    }
    changes = {f"evaluate__{key}": value for key, value in evaluate.items()}
    config = load_config(
        str(
            lab_config(
                **changes,
                data__forget__perturbed_field="wrong",
                compare__oracle="/secret/oracle",
                store__dir="/secret/stores",
            )
        )
    )
    found = without_places(config.model_dump(mode="json"))
    assert "/secret" not in json.dumps(found)
    assert found["evaluate"]["models"] == {"npo": "npo"}
    assert found["evaluate"]["tofu"]["reference"] == "TOFU_EVAL.json"
    assert found["evaluate"]["tofu"]["reference_model"] == "base"
    assert found["compare"]["oracle"] == "oracle"


def test_weights_that_change_are_hashed_anew(tmp_path):
    shutil.copytree(LAB_BASE, tmp_path / "model")
    before = weights_sha256(tmp_path / "model")
    assert weights_sha256(tmp_path / "model") == before == weights_sha256(LAB_BASE)
    flip_byte(tmp_path / "model" / "model.safetensors")
    assert weights_sha256(tmp_path / "model") != before
