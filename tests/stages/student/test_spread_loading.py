"""FSDP loads layer by layer: two processes (gloo, on a CPU) have the weights of one, and neither ever holds a whole model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from support import LAB_VOCAB_SIZE, ROOT
from tiny_models import tiny_config, tiny_model
from warm import PROGRAM

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "head_dim": 96,
}
JOBS = [{"lora": {"rank": 2}}, {}, {"noise": 0.2}]  # the first also loads libraries


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> list[dict]:
    """What the processes found for each of JOBS, with a model of bfloat16."""
    folder: Path = tmp_path_factory.mktemp("model")
    config = tiny_config("llama", LAB_VOCAB_SIZE, tie_word_embeddings=True, **SIZES)
    tiny_model(config).to(torch.bfloat16).save_pretrained(folder)
    code = (
        "import sys; sys.path.insert(0, 'tests/helpers'); import spread_students; spread_students.main(*sys.argv[1:])"
    )
    command = [*PROGRAM, "-c", code, str(folder), *map(json.dumps, JOBS)]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank)}, text=True, stdout=PIPE, stderr=PIPE)
        for rank in range(2)
    ]
    (out, said), (_, other) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], said + other
    return [json.loads(line) for line in out.splitlines()]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_what_was_read_layer_by_layer_is_what_is_loaded_whole(loaded):
    assert [job["differing"] for job in loaded] == [[]] * len(JOBS)


@pytest.mark.parametrize("number", range(1, len(JOBS)))
def test_no_process_holds_a_whole_model_while_it_loads(loaded, number):
    """Half of it in float32, and one of nine layers beside it; damaged weights too."""
    whole = 4 * loaded[number]["parameters"]
    assert whole > 200e6
    assert loaded[number]["bytes"] < 0.8 * whole
