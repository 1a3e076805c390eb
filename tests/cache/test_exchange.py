"""Stores go out in other formats and come back: the same rows, the same fingerprint, or an error that was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import flip_byte, make_plan, make_rows, read_all, same_rows, with_broad, write_store

from duet.cache import exchange, exchange_distillkit
from duet.cache.errors import DamagedStore, UserError
from duet.cache.exchange import export_store, import_store
from duet.cache.exchange_distillkit import Grid
from duet.cache.location import Folder
from duet.cache.maintain import convert, invalidate
from duet.cache.manifest import read_manifest
from duet.cache.plan import read_plan
from duet.cache.reader import Store

TOKENIZER = {"tokenizer/tokenizer.json": b"{}"}


def a_store(folder, values="lossless", logsumexp=True, vocab_size=100_000, **more):
    """Ten rows of one to three positions in three shards, two of them broad; its rows."""
    rows = make_rows(range(10), positions=None, vocab_size=vocab_size, logsumexp=logsumexp, forget=3)
    if values != "float16" and logsumexp:
        rows = replace(rows, topk_logits_NK=rows.topk_logits_NK + np.float32(1e-3), logsumexp_N=rows.logsumexp_N + 1)
    plan, rows = with_broad(make_plan(10, 3, vocab_size=vocab_size, values=values, **more), rows, 2)
    write_store(folder, plan, rows, TOKENIZER)
    return read_all(folder)


@pytest.mark.parametrize("store_format", ["arrow", "zarr"])
@pytest.mark.parametrize("values", ["float16", "lossless", "linear16"])
@pytest.mark.parametrize("exchange_format", ["parquet", "hf"])
def test_a_store_comes_back_bit_for_bit(tmp_path, exchange_format, values, store_format):
    rows = a_store(tmp_path / "store", values, format=store_format)
    export = export_store(Folder(tmp_path / "store"), tmp_path / "out", exchange_format)
    location, manifest = import_store(tmp_path / "out", Folder(tmp_path / "back"), store_format, "zstd")
    before = read_manifest(Folder(tmp_path / "store"))
    assert export.value_error == 0
    assert same_rows(read_all(location), rows)
    assert manifest.fingerprint == before.fingerprint
    assert manifest.value_error == before.value_error
    assert manifest.attachments == before.attachments
    assert manifest.value_dtype == ("float32" if values == "linear16" else before.value_dtype)


def test_a_store_without_log_sum_exp_comes_back(tmp_path):
    rows = a_store(tmp_path / "store", "float16", logsumexp=False)
    export_store(Folder(tmp_path / "store"), tmp_path / "out", "parquet")
    assert "logsumexp" not in pq.read_table(tmp_path / "out" / "data").column_names
    location, _ = import_store(tmp_path / "out", Folder(tmp_path / "back"), "arrow", "none")
    back = read_all(location)
    assert back.logsumexp_N is None
    assert same_rows(replace(back, logsumexp_N=0), replace(rows, logsumexp_N=0))
    with pytest.raises(UserError, match="log-sum-exp"):
        export_store(Folder(tmp_path / "store"), tmp_path / "kit", "distillkit")
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize("values", ["float16", "lossless"])
def test_distillkits_layout_comes_back_within_its_measured_error(tmp_path, values):
    rows = a_store(tmp_path / "store", values)
    export = export_store(Folder(tmp_path / "store"), tmp_path / "out", "distillkit")
    location, manifest = import_store(tmp_path / "out", Folder(tmp_path / "back"), "arrow", "none")
    back = read_all(location)
    assert same_rows(replace(back, topk_logits_NK=rows.topk_logits_NK), rows)
    assert np.abs(back.topk_logits_NK - rows.topk_logits_NK).max() == export.value_error < 1e-6
    before = read_manifest(Folder(tmp_path / "store"))
    assert manifest.value_error == before.value_error + export.value_error
    if values == "float16":  # the rounding of a log-probability is taken away again
        assert export.value_error == 0
        assert manifest.fingerprint == before.fingerprint
    else:
        assert export.value_error > 0
        assert manifest.provenance["imported"] == {"format": "distillkit", "value_error": export.value_error}
        assert manifest.fingerprint != before.fingerprint


def test_parquet_says_what_the_document_says(tmp_path):
    rows = a_store(tmp_path / "store")
    export_store(Folder(tmp_path / "store"), tmp_path / "out", "parquet")
    table = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert [row["row_id"] for row in table] == list(rows.row_ids)
    assert [row["subset"] for row in table] == ["forget"] * 3 + ["retain"] * 5 + ["broad"] * 2
    for number, row in enumerate(table):
        first, end = rows.position_offsets[number : number + 2]
        tokens = rows.tokens_S[rows.token_offsets[number] : rows.token_offsets[number + 1]].tolist()
        assert row["prompt"] + row["response"] == tokens
        assert [tokens[at + 1] for at in row["position"]] == row["response"]
        assert row["ids"] == rows.topk_ids_NK[first:end].tolist()
        assert row["logits"] == rows.topk_logits_NK[first:end].tolist()
        assert row["logsumexp"] == rows.logsumexp_N[first:end].tolist()


def test_datasets_loads_all_three(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = a_store(tmp_path / "store")
    for exchange_format in ("parquet", "hf", "distillkit"):
        export_store(Folder(tmp_path / "store"), tmp_path / exchange_format, exchange_format)
    of_hub = datasets.load_dataset(str(tmp_path / "parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    of_disk = datasets.load_from_disk(str(tmp_path / "hf"))
    assert of_hub[7] == of_disk[7]
    assert of_disk[7]["ids"] == rows.topk_ids_NK[slice(*rows.position_offsets[7:9])].tolist()
    kit = datasets.load_from_disk(str(tmp_path / "distillkit"))
    assert set(kit.column_names) == {
        "input_ids",
        "attention_mask",
        "labels",
        "compressed_logprobs",
        "bytepacked_indices",
    }
    assert len({len(row["input_ids"]) for row in kit}) == 1  # rows that can be stacked
    assert {type(value[0]) for row in kit for value in row.values()} == {int, list}  # of which torch makes tensors


def test_distillkits_rows_mean_what_its_reader_takes_them_for(tmp_path):
    """Big-endian bits, ceil(log2 d) of each id; float32 log-probabilities; labels as mask."""
    rows = a_store(tmp_path / "store")
    export_store(Folder(tmp_path / "store"), tmp_path / "out", "distillkit")
    config = dict(line.split(": ") for line in (tmp_path / "out/compression_config.yaml").read_text().splitlines())
    assert (config["d"], config["k"], config["exact_k"], config["exact_dtype"]) == ("100000", "4", "4", "float32")
    bits, found = int(np.ceil(np.log2(int(config["d"])))), []
    for path in sorted((tmp_path / "out").glob("data-*.arrow")):
        found += pa.ipc.open_stream(path).read_all().to_pylist()
    for number, row in enumerate(found):
        first, end = rows.position_offsets[number : number + 2]
        tokens = rows.tokens_S[rows.token_offsets[number] : rows.token_offsets[number + 1]].tolist()
        assert row["input_ids"][: sum(row["attention_mask"])] == tokens
        supervised = [at for at, label in enumerate(row["labels"]) if label >= 0]
        assert [row["input_ids"][at + 1] for at in supervised] == tokens[len(tokens) - (end - first) :]
        for at, position in zip(supervised, range(first, end), strict=True):
            text = "".join(f"{byte:08b}" for byte in row["bytepacked_indices"][at])
            ids = [int(text[start : start + bits], 2) for start in range(0, 4 * bits, bits)]
            assert ids == rows.topk_ids_NK[position].tolist()
            logprobs = np.frombuffer(bytes(row["compressed_logprobs"][at]), "<f4")
            np.testing.assert_array_equal(logprobs, rows.topk_logits_NK[position] - rows.logsumexp_N[position])


@given(st.integers(2, 2**20), st.integers(1, 9), st.integers(1, 5), st.randoms(use_true_random=False))
def test_packed_ids_come_back(vocab_size, top_k, count, random):
    ids = np.array([[random.randrange(vocab_size) for _ in range(top_k)] for _ in range(count)], np.int32).reshape(
        -1, top_k
    )
    bits = Grid(8, top_k, vocab_size, "float32").id_bits
    packed = exchange_distillkit.pack(ids, bits)
    assert packed.shape == (count, -(-top_k * bits // 8))
    assert np.array_equal(exchange_distillkit.unpack(packed, bits, top_k), ids)


def test_what_is_there_is_left_alone(tmp_path):
    a_store(tmp_path / "store")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("a file")
    for place, message in (("out", "there already"), ("link", "there already"), ("file/out", "file is a file")):
        with pytest.raises(UserError, match=message):
            export_store(Folder(tmp_path / "store"), tmp_path / place, "parquet")
    assert not list((tmp_path / "out").iterdir())


def test_what_came_to_be_there_during_an_export_is_left_alone(tmp_path, monkeypatch):
    a_store(tmp_path / "store")
    describe = exchange._describe

    def meanwhile(*of):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("of three years")
        describe(*of)

    monkeypatch.setattr(exchange, "_describe", meanwhile)
    with pytest.raises(UserError, match="was not there before, and is now") as refused:
        export_store(Folder(tmp_path / "store"), tmp_path / "out", "parquet")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "of three years"
    assert str(tmp_path / ".out.tmp") in refused.value.hint
    (tmp_path / ".out.tmp").rename(tmp_path / "moved")
    assert import_store(tmp_path / "moved", Folder(tmp_path / "back"), "arrow", "none")[1].rows == 10


@pytest.mark.parametrize("exchange_format", ["parquet", "hf", "distillkit"])
def test_more_numbers_than_lists_can_count_are_refused(tmp_path, monkeypatch, exchange_format):
    a_store(tmp_path / "store")
    monkeypatch.setattr(exchange, "MOST_NUMBERS", 4095 * 4)  # of 1,365 rows; in distillkit of 4,096 tokens' bytes
    with pytest.raises(UserError, match="numbers at once"):
        export_store(Folder(tmp_path / "store"), tmp_path / "out", exchange_format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", ["lossless", "float16", "float32"])
def test_a_store_that_was_imported_or_converted_is_repaired_by_the_config_that_made_it(tmp_path, values):
    a_store(tmp_path / "store", values)
    plan = read_plan(Folder(tmp_path / "store"))
    assert plan is not None
    export_store(Folder(tmp_path / "store"), tmp_path / "out", "parquet")
    imported, _ = import_store(tmp_path / "out", Folder(tmp_path / "back"), "arrow", "none")
    convert(Folder(tmp_path / "store"), Folder(tmp_path / "other"), "zarr", "none")
    for location, shard in ((imported, "shard-00001.arrow"), (Folder(tmp_path / "other"), "shard-00001.zarr.zip")):
        location.remove(shard)
        assert invalidate(location, replace(plan, format="zarr" if shard.endswith("zip") else "arrow")) == [1]


@pytest.mark.parametrize("content", [b"[]", None])
def test_a_store_whose_tokenizer_was_changed_is_not_written_anew(tmp_path, content):
    """An export vouches for its files, and a converted store for its own: a fault of before would no longer show."""
    a_store(tmp_path / "store")
    file = tmp_path / "store/tokenizer/tokenizer.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DamagedStore, match=r"tokenizer\.json is missing or is not as it was written"):
        export_store(Folder(tmp_path / "store"), tmp_path / "out", "parquet")
    with pytest.raises(DamagedStore, match=r"tokenizer\.json is missing or is not as it was written"):
        convert(Folder(tmp_path / "store"), Folder(tmp_path / "other"), "zarr", "none")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(UserError, match="not an export"):
        import_store(tmp_path, Folder(tmp_path / "back"), "arrow", "none")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("exchange_format", ["parquet", "hf", "distillkit"])
def test_a_changed_export_is_refused(tmp_path, exchange_format):
    a_store(tmp_path / "store")
    export_store(Folder(tmp_path / "store"), tmp_path / "out", exchange_format)
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    for path in files:
        kept = path.read_bytes()
        flip_byte(path)
        with pytest.raises(DamagedStore, match=r"not as it was|not valid JSON"):
            import_store(tmp_path / "out", Folder(tmp_path / "back"), "arrow", "none")
        path.write_bytes(kept)
    import_store(tmp_path / "out", Folder(tmp_path / "back"), "arrow", "none")


def test_an_export_that_lacks_a_shards_file_is_refused(tmp_path):
    """Even where its own description agrees: somebody made it so."""
    from duet.cache.files import json_bytes, signed

    a_store(tmp_path / "store")
    export_store(Folder(tmp_path / "store"), tmp_path / "out", "parquet")
    path = tmp_path / "out/duet/export.json"
    described = json.loads(path.read_text())
    del described["sha256"], described["files"]["data/rows-00001.parquet"]
    path.write_bytes(json_bytes(signed(described, "sha256")))
    (tmp_path / "out/data/rows-00001.parquet").unlink()
    with pytest.raises(DamagedStore, match="does not hold the rows"):
        import_store(tmp_path / "out", Folder(tmp_path / "back"), "arrow", "none")
    assert not list((tmp_path / "back").rglob("manifest.json"))


def test_blocks_come_one_at_a_time(tmp_path):
    rows = a_store(tmp_path / "store")
    store = Store(Folder(tmp_path / "store"))
    found = [row_id for shard in range(3) for block in store.each_block(shard) for row_id in block.row_ids.to_pylist()]
    assert found == list(rows.row_ids)
