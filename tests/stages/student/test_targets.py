"""Several teachers: their rows side by side, averaged and mixed, against references computed position by position."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from student_jobs import ONE, job, noting
from support import LAB_SMALL, LAB_VOCAB_SIZE, make_plan, make_rows, write_store

from duet.cache.codec import Block, Layout, encode
from duet.cache.errors import Interrupted, UserError
from duet.cache.location import Folder
from duet.cache.plan import read_plan
from duet.cache.reader import Store
from duet.cache.record import Rows, counts_of, prompt_and_response
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer, tokenizer_files, tokenizer_sha256
from duet.stages.settings.student import TrainSettings
from duet.stages.student.losses import LOSSES, loss_of
from duet.stages.student.passes import Pass, passes_of
from duet.stages.student.targets import Targets, Teachers, averaged, mixed
from duet.stages.student.train import open_stores, train_student

K = 5
WEIGHTS = [0.25, 0.75]
NUM_ROWS = 9


def rows_of(number: int, positions: int | None, count: int = NUM_ROWS) -> Rows:
    """Those of teacher `number`: prompts, ids and subsets are the first's, three of its five ids too, logits are its own.

    Of several positions, the response of row i is as the first teacher's for i % 3 tokens.
    """
    first = make_rows(range(count), positions, top_k=K, vocab_size=LAB_VOCAB_SIZE, forget=count // 2)
    if number == 0:
        return first
    rng = np.random.default_rng(number)
    ids, tokens = first.topk_ids_NK.copy(), first.tokens_S.copy()
    for position in ids:
        position[rng.permutation(K)[:2]] = rng.choice(
            np.setdiff1d(np.arange(LAB_VOCAB_SIZE), position), 2, replace=False
        )
    for row, (end, length) in enumerate(zip(first.token_offsets[1:], counts_of(first.position_offsets), strict=True)):
        if row % 3 < length:
            tokens[end - length + row % 3] = (tokens[end - length + row % 3] + 1) % LAB_VOCAB_SIZE
    logits = -np.sort(-rng.normal(size=ids.shape).astype(np.float16).astype(np.float32), axis=1)
    return replace(
        first,
        topk_ids_NK=rng.permuted(ids, axis=1),
        tokens_S=tokens,
        topk_logits_NK=logits,
        logsumexp_N=logits[:, 0] + 1,
    )


def block_of(rows: Rows) -> Block:
    return encode(rows, Layout(K, LAB_VOCAB_SIZE), "lossless")[0]


def two(positions: int | None) -> list[Block]:
    return [block_of(rows_of(number, positions)) for number in range(2)]


def average_by_hand(blocks: list[Block], row: int) -> list[dict[int, float]]:
    """Id -> mean logit, position by position, from dictionaries of Python floats."""
    found = []
    for j in range(min(int(counts_of(block.position_offsets)[row]) for block in blocks)):
        if j and len({tuple(prompt_and_response(block, row)[1][:j].tolist()) for block in blocks}) > 1:
            break
        at = [int(block.position_offsets[row]) + j for block in blocks]
        kept = [
            dict(zip(b.topk_ids()[n].tolist(), b.topk_logits()[n].tolist(), strict=True))
            for b, n in zip(blocks, at, strict=True)
        ]
        common = set.intersection(*map(set, kept))
        if not common:
            break
        found.append({i: sum(w * one[i] for w, one in zip(WEIGHTS, kept, strict=True)) for i in common})
    return found


@pytest.mark.parametrize("positions", [1, 3, None])
def test_an_average_is_the_mean_at_the_common_ids_as_long_as_the_responses_agree(positions):
    blocks = two(positions)
    targets = averaged(blocks, WEIGHTS)
    lengths = []
    for row in range(NUM_ROWS):
        expected = average_by_hand(blocks, row)
        first, end = targets.position_offsets[row : row + 2]
        assert end - first == len(expected)
        lengths.append(len(expected))
        for n, by_id in zip(range(first, end), expected, strict=True):
            counted = targets.mask_NK[n]
            ids = targets.topk_ids_NK[n][counted].tolist()
            assert counted.tolist() == sorted(counted.tolist(), reverse=True), "those that do not count are last"
            assert sorted(ids) == sorted(by_id)
            assert ids == sorted(by_id, key=lambda i: -by_id[i])
            assert targets.topk_logits_NK[n][counted] == pytest.approx([by_id[i] for i in ids], rel=1e-6)
        prompt, response = prompt_and_response(targets, row)
        theirs = prompt_and_response(blocks[0], row)
        assert prompt.tolist() == theirs[0].tolist()
        assert response.tolist() == theirs[1][: len(expected)].tolist()
    assert set(lengths) == ({1} if positions == 1 else {1, 2, 3})
    assert targets.weight_R.tolist() == [1.0] * NUM_ROWS


def losses_by_row(targets: Targets, model, settings: TrainSettings, loss) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, weight) of every position in float64, in the targets' order, each row read by itself in full."""
    found, weights = [], []
    for row in range(len(targets.subsets)):
        prompt, response = prompt_and_response(targets, row)
        first, end = targets.position_offsets[row : row + 2]
        with torch.no_grad():
            logits_TV = model(input_ids=torch.from_numpy(np.concatenate([prompt, response])).long()[None]).logits[0]
        for j, n in enumerate(range(first, end)):
            counted = slice(None) if targets.mask_NK is None else targets.mask_NK[n]
            ids = torch.from_numpy(targets.topk_ids_NK[n][counted]).long()
            student, teacher = logits_TV[len(prompt) - 1 + j][ids], torch.from_numpy(targets.topk_logits_NK[n][counted])
            found.append(loss(student[None].double(), teacher[None].double()))
            weights.append(float(targets.weight_R[row]) * settings.position_decay**j)
    return torch.cat(found), torch.tensor(weights).double()


def huber(student, teacher) -> torch.Tensor:
    """Huber with delta 1 from its definition."""
    size = (student - teacher).abs()
    return torch.where(size <= 1, size**2 / 2, size - 0.5).sum(-1)


def looked_at(passes: list[Pass], model, loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, weight) of all positions of the passes."""
    function, found, weights = loss_of(loss), [], []
    for one in passes:
        with torch.no_grad():
            out = model(input_ids=one.batch.input_ids_BT, attention_mask=one.batch.attention_mask_BT).logits
        student = out[one.batch.batch_index_N, one.batch.position_N].gather(1, one.topk_ids_NK)
        found.append(function(replace(one.teacher, logits_NK=student), one.teacher))
        weights.append(one.weight_N)
    return torch.cat(found).double(), torch.cat(weights).double()


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("together", [mixed, averaged])
def test_the_loss_of_a_batch_is_that_of_its_rows_one_by_one(together, positions):
    """Of a mix: of each teacher's rows, with its own response as the input, times its weight."""
    settings, model = TrainSettings(position_decay=0.5), load_model(LAB_SMALL, "float32").eval()
    blocks = two(positions)
    targets = together(blocks, WEIGHTS)
    ours_N, weight_N = looked_at(passes_of(targets, settings, pad_id=0), model, "huber_raw")
    expected_N, expected_weight_N = losses_by_row(targets, model, settings, huber)
    assert (ours_N * weight_N).sum() == pytest.approx((expected_N * expected_weight_N).sum().item(), rel=1e-4)
    assert weight_N.sum() == pytest.approx(expected_weight_N.sum().item())
    if together is mixed:
        each = [losses_by_row(mixed([block], [1.0]), model, settings, huber) for block in blocks]
        by_teacher = sum(w * (loss * weight).sum().item() for w, (loss, weight) in zip(WEIGHTS, each, strict=True))
        assert (ours_N * weight_N).sum() == pytest.approx(by_teacher, rel=1e-4)
        assert weight_N.sum() == pytest.approx(each[0][1].sum().item()), "a query counts once, whatever its teachers"


def test_what_a_student_reads_alike_for_several_teachers_it_reads_once():
    settings = TrainSettings()
    for positions, extra in (
        (1, 0),
        (3, 6),
    ):  # of 9 rows, those whose responses differ at the first or second of three tokens
        blocks = two(positions)
        read = [one.batch.input_ids_BT for one in passes_of(mixed(blocks, WEIGHTS), settings, 0)]
        alone = [one.batch.input_ids_BT for one in passes_of(mixed(blocks[:1], [1.0]), settings, 0)]
        assert sum(map(len, alone)) == NUM_ROWS
        assert sum(map(len, read)) == NUM_ROWS + extra


def test_one_teacher_alone_is_its_store():
    block = block_of(rows_of(0, 3))
    targets, rows = mixed([block], [1.0]), block.decoded()
    for name in (
        "subsets",
        "token_offsets",
        "tokens_S",
        "position_offsets",
        "topk_ids_NK",
        "topk_logits_NK",
        "logsumexp_N",
    ):
        assert np.array_equal(getattr(targets, name), getattr(rows, name)), name
    assert targets.mask_NK is None
    assert targets.weight_R.tolist() == [1.0] * NUM_ROWS
    assert targets.sequence_R.tolist() == list(range(NUM_ROWS))


def test_a_row_whose_teachers_share_no_id_cannot_be_averaged():
    blocks = two(1)
    ids = rows_of(0, 1).topk_ids_NK.copy()
    ids[4] = np.setdiff1d(np.arange(LAB_VOCAB_SIZE), ids[4])[:K]
    with pytest.raises(UserError, match=r"row 'retain/4': the teachers have fewer than 1 of their 5 ids in common"):
        averaged([blocks[0], block_of(replace(rows_of(1, 1), topk_ids_NK=ids))], WEIGHTS)
    later = rows_of(0, 3).topk_ids_NK.copy()
    later[3 * 2 + 1] = np.setdiff1d(np.arange(LAB_VOCAB_SIZE), later[3 * 2 + 1])[:K]
    targets = averaged([block_of(rows_of(0, 3)), block_of(replace(rows_of(0, 3), topk_ids_NK=later))], WEIGHTS)
    assert counts_of(targets.position_offsets).tolist() == [3, 3, 1, *[3] * 6], (
        "it ends before the position without one"
    )


@pytest.mark.parametrize("loss", ["huber_centred", "forward_kl_topk", "jsd_topk"])
def test_a_position_with_one_common_id_is_no_target_of_a_loss_that_compares_ids(tmp_path, stores, loss):
    """Such a loss is 0 there, whatever the student says."""
    others = rows_of(1, 3, count=20)
    firsts = rows_of(0, 3, count=20).topk_ids_NK

    def one_in_common(position: int) -> dict[str, Store]:
        ids = others.topk_ids_NK.copy()
        for at in range(position, len(ids), 3):
            unknown = np.setdiff1d(np.arange(LAB_VOCAB_SIZE), firsts[at])
            ids[at] = [firsts[at, 0], *unknown[: K - 1]]
        folder, store = tmp_path / str(position), stores[0]["strict"]
        attachments = {name: store.location.read(name) for name in store.manifest.attachments}
        plan = replace(read_plan(store.location), attachments={})
        write_store(folder, plan, replace(others, topk_ids_NK=ids), attachments)
        return {"mild": stores[0]["mild"], "strict": Store(Folder(folder))}

    settings = {"combine": "average", "probe": {"steps": 18}, "epochs": 1}
    with pytest.raises(UserError, match="fewer than 2 of their 5 ids in common at the first position"):
        train(tmp_path / "first", (one_in_common(0), stores[1]), loss=loss, **settings)
    train(tmp_path / "later", (one_in_common(2), stores[1]), loss=loss, **settings)
    train(tmp_path / "raw", (one_in_common(2), stores[1]), loss="huber_raw", **settings)
    shares = [summary_of(tmp_path / name)["position_share"] for name in ("later", "raw")]
    assert shares == pytest.approx([(7 * 1 + 13 * 2) / 60, (7 * 1 + 7 * 2 + 6 * 3) / 60])


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[dict[str, Store], object]:
    folder, tokenizer = tmp_path_factory.mktemp("stores"), load_tokenizer(LAB_SMALL)
    provenance = {
        "tokenizer_sha256": tokenizer_sha256(tokenizer), "weights_sha256": "0" * 64, "engine": "none", "dtype": "float32",
    }  # fmt: skip
    for number, name in enumerate(("mild", "strict")):
        plan = make_plan(
            20, 10, shard_rows=6, top_k=K, vocab_size=LAB_VOCAB_SIZE, provenance=provenance | {"prefix": name}
        )
        write_store(folder / name, plan, rows_of(number, 3, count=20), tokenizer_files(tokenizer))
    return open_stores({name: Folder(folder / name) for name in ("strict", "mild")}, verify=True)


def train(student_dir: Path, stores, stop_after: int | None = None, **settings) -> list[float]:
    losses: list[float] = []
    train_student(job(student_dir, **settings), *stores, ONE, noting(losses, stop_after))
    return losses


def summary_of(student_dir: Path) -> dict:
    return json.loads((student_dir / "training.json").read_text())


def test_batches_of_several_stores_are_of_the_same_rows(stores):
    teachers = Teachers.of(stores[0], TrainSettings())
    assert list(teachers.stores) == ["mild", "strict"]
    order = teachers.order(TrainSettings())
    for (cursor, blocks), (expected, block) in zip(
        teachers.batches(order, 8), stores[0]["mild"].batches(order, 8), strict=True
    ):
        assert cursor == expected
        assert all(one.row_ids.to_pylist() == block.row_ids.to_pylist() for one in blocks)
        if cursor.epoch == 2:
            break


@pytest.mark.parametrize("combine", ["mix", "average"])
@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if not loss.needs_logsumexp])
def test_every_loss_without_a_tail_is_learned_from_two_teachers(tmp_path, stores, combine, loss):
    losses = train(tmp_path / "s", stores, combine=combine, loss=loss, epochs=12, probe={"steps": 18})
    assert losses[-1] < losses[0]
    summary = summary_of(tmp_path / "s")
    assert summary["combine"] == combine
    assert {name: facts["weight"] for name, facts in summary["teachers"].items()} == {"mild": 0.5, "strict": 0.5}
    card = (tmp_path / "s/model/README.md").read_text()
    for store in stores[0].values():
        assert store.manifest.fingerprint[:16] in card
    assert f"weight 0.5 of the {combine}" in card
    assert "mild" not in card
    if combine == "average":
        assert summary["position_share"] == pytest.approx((7 * 1 + 7 * 2 + 6 * 3) / 60)
        assert summary["ids_per_position"] == 3


def test_a_mix_may_have_a_tail_and_an_average_may_not(tmp_path, stores):
    losses = train(tmp_path / "mix", stores, loss="forward_kl_tail", epochs=12)
    assert losses[-1] < losses[0]
    with pytest.raises(
        UserError, match="forward_kl_tail needs a log-sum-exp, and an average, of common ids only, has none"
    ):
        train(tmp_path / "s", stores, loss="forward_kl_tail", combine="average")
    assert not (tmp_path / "s").exists()


def test_one_of_two_is_that_one_alone_bit_for_bit(tmp_path, stores):
    named = train(tmp_path / "named", stores, teachers={"strict": 1})
    alone = train(tmp_path / "alone", ({"teacher": stores[0]["strict"]}, stores[1]))
    both = train(tmp_path / "both", stores, teachers={"strict": 1, "mild": 0})
    assert named == alone == both
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("named", "alone"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert list(summary_of(tmp_path / "named")["teachers"]) == ["strict"]
    assert summary_of(tmp_path / "named")["combine"] is None


@pytest.mark.parametrize("combine", ["mix", "average"])
def test_an_interrupted_student_of_two_teachers_is_the_unbroken_one_bit_for_bit(tmp_path, stores, combine):
    settings = {"combine": combine, "teachers": {"mild": 3, "strict": 1}}
    whole = train(tmp_path / "whole", stores, **settings)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", stores, stop_after=4, **settings)
    swapped = ({name: stores[0][name] for name in ("mild", "strict")}, stores[1])
    assert train(tmp_path / "cut", swapped, **settings) == whole[4:]
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    with pytest.raises(
        UserError, match=r"holds another run: teachers.mild is .* there and None now; train.teachers is"
    ):
        train(tmp_path / "cut", stores, teachers={"strict": 1}, combine=None)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"teachers": {"stern": 1}}, "no teacher 'stern'", "the teachers are mild, strict"),
        ({"teachers": {"mild": 0, "strict": 0}}, "leaves out every teacher", "above 0"),
        ({"teachers": {"mild": 2}}, "the weight of a single teacher does nothing", "give mild the weight 1"),
        ({"teachers": {"mild": 1}, "combine": "mix"}, "combine does nothing with one teacher", "leave it out"),
    ],
)
def test_settings_of_teachers_that_make_no_sense_are_refused(tmp_path, stores, settings, message, hint):
    with pytest.raises(UserError, match=message) as caught:
        train(tmp_path / "s", stores, **settings)
    assert hint in caught.value.hint
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("settings", [{"teachers": {"teacher": 1}}, {"combine": "average"}])
def test_with_one_store_settings_of_teachers_do_nothing(tmp_path, stores, settings):
    with pytest.raises(UserError, match="does nothing"):
        train(tmp_path / "s", ({"teacher": stores[0]["mild"]}, stores[1]), **settings)
