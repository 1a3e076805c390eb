"""Stores on object storage, against a real S3 server on this machine that s3fs finds by environment variables alone."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from support import ROOT, flip_byte, make_plan, make_rows, read_all, same_rows, two_sets, write_store

from duet.cache import maintain, reader
from duet.cache.errors import EXIT_DONE, EXIT_USER, UserError
from duet.cache.location import Folder, Location, local_folder, location_of
from duet.cache.manifest import MANIFEST_NAME
from duet.cache.reader import Store
from duet.cache.writer import StoreWriter
from duet.pipeline.cli.main import main

FORMATS = ("arrow", "zarr")
ROWS = make_rows(range(10), positions=None, forget=4)
PLAN = make_plan(10, 4, shard_rows=2)
TOKENIZER = {"tokenizer/t.json": b'{"a": 1}'}


@dataclass
class Server(logging.Handler):
    """A running S3 server and the requests that it has answered, e.g. "GET /bucket/key"."""

    url: str
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    __hash__ = logging.Handler.__hash__

    def emit(self, record: logging.LogRecord) -> None:
        self.requests += re.findall(r"(?:GET|PUT|DELETE) [^ ?]+", record.getMessage())

    def of_shards(self, method: str) -> list[str]:
        """Shards of the answered requests of this method, in order."""
        matches = (re.fullmatch(rf"{method} .*/(shard-\d+)\.(arrow|zarr\.zip)", request) for request in self.requests)
        return [match[1] for match in matches if match]

    def enforce_credentials(self, enforce: bool) -> None:
        count = b"0" if enforce else b"inf"  # of requests before credentials are looked at
        request = urllib.request.Request(f"{self.url}/moto-api/reset-auth", count, {"Content-Type": "text/plain"})
        urllib.request.urlopen(request).close()


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    """The server, and an environment as a user would set it."""
    thread = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    log = logging.getLogger("werkzeug")
    thread.start()
    server = Server("http://{}:{}".format(*thread.get_host_and_port()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "level", logging.INFO)
        patch.setattr(log, "propagate", False)
        patch.setattr(log, "handlers", [server])
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            patch.setenv(name, value)
        forget_connections()
        yield server
        forget_connections()
    thread.stop()


@pytest.fixture
def server(running, tmp_path, monkeypatch) -> Iterator[Server]:
    """The server with an empty bucket `stores`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where the local cache of `duet cache` lies
    storage().mkdir("stores")
    running.requests.clear()
    yield running
    storage().rm("stores", recursive=True)


@pytest.fixture
def _signals_are_restored() -> Iterator[None]:
    """Stages that run in this process handle them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def storage() -> Any:
    return fsspec.filesystem("s3", use_listings_cache=False)


def forget_connections() -> None:
    """The environment is read once per file system."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def remote(tmp_path: Path, name: str = "s", cache_bytes: int = 10**9) -> Location:
    return location_of(f"s3://stores/{name}", str(tmp_path / "cache"), cache_bytes)


def cached_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").iterdir() if path.is_file() and path.stat().st_size]


def cached_bytes(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in cached_files(tmp_path))


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_remote_store_is_the_local_one(server, tmp_path, monkeypatch, fmt):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    plan = make_plan(10, 4, format=fmt)
    location = remote(tmp_path)
    manifest = write_store(location, plan, ROWS, TOKENIZER)
    assert manifest == write_store(tmp_path / "local", plan, ROWS, TOKENIZER)
    assert same_rows(read_all(location), ROWS)
    assert not list(maintain.verify(location, manifest))
    assert (local_folder(location, "tokenizer", manifest.attachments) / "t.json").read_bytes() == b'{"a": 1}'
    assert location.names() == Folder(tmp_path / "local").names()
    assert location.sizes() == Folder(tmp_path / "local").sizes()
    assert not list((tmp_path / "tmp").iterdir())
    hashes = {shard.sha256 for shard in manifest.shards}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {*hashes, ".lock", "attachments"}


def test_a_tokenizer_is_copied_once(server, tmp_path):
    location = remote(tmp_path)
    manifest = write_store(location, PLAN, ROWS, TOKENIZER)
    folders = {local_folder(location, "tokenizer", manifest.attachments) for _ in range(3)}
    assert len(folders) == 1
    assert [path.name for path in folders.pop().iterdir()] == ["t.json"]


def test_an_interrupted_write_is_resumed_at_the_next_shard(server, tmp_path):
    location = remote(tmp_path)
    with StoreWriter(location, PLAN, TOKENIZER) as writer:
        written = []
        for _ in range(2):
            shard = writer.claim()
            written.append(shard.index)
            shard.append(ROWS[shard.range.start : shard.range.stop])
            writer.publish(shard)
            writer.wait()
    with pytest.raises(UserError, match="s3://stores/s is incomplete: 2 of 5 shards"):
        Store(location)
    with pytest.raises(UserError, match="shard_rows 2 there and 3 now"):
        StoreWriter(location, dataclasses.replace(PLAN, shard_rows=3), TOKENIZER)
    location.remove(PLAN.side_name(written[1]))  # its writer died between the shard and its side file
    server.requests.clear()
    write_store(location, PLAN, ROWS, TOKENIZER)
    assert sorted(server.of_shards("PUT")) == [f"shard-{index:05d}" for index in range(5) if index != written[0]]
    assert same_rows(read_all(location), ROWS)


def test_a_foreign_folder_is_refused_but_not_for_an_empty_marker(server, tmp_path):
    """The web page of S3 makes a folder by an empty object whose name ends with a slash."""
    storage().pipe_file("stores/s/", b"")
    StoreWriter(remote(tmp_path), PLAN).__exit__()
    storage().pipe_file("stores/foreign/thesis.tex", b"x")
    with pytest.raises(UserError, match="not empty"):
        StoreWriter(remote(tmp_path, "foreign"), PLAN)
    assert remote(tmp_path, "").folders() == ["foreign", "s"]
    assert remote(tmp_path, "").size("s") is None


def test_only_the_damaged_shard_is_written_again(server, tmp_path):
    location = remote(tmp_path)
    good = write_store(location, PLAN, ROWS)
    damage_flipped("stores/s/shard-00001.arrow")
    assert maintain.invalidate(location, PLAN) == [1]
    server.requests.clear()
    assert write_store(location, PLAN, ROWS) == good
    assert server.of_shards("PUT") == ["shard-00001"]


def test_the_local_cache_stays_within_its_bound(server, tmp_path):
    manifest = write_store(remote(tmp_path), PLAN, ROWS)
    bound = 2 * max(shard.bytes for shard in manifest.shards)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f".{'0' * 64}.1.tmp").write_bytes(bytes(bound))  # of a process that was killed
    store = Store(remote(tmp_path, cache_bytes=bound))
    for _ in range(2):
        for number, rows in enumerate(store.rows()):
            assert same_rows(rows, ROWS[2 * number : 2 * number + 2])
            assert 0 < cached_bytes(tmp_path) <= bound
    assert len(cached_files(tmp_path)) == 2


def test_what_was_not_used_for_longest_goes_first(server, tmp_path):
    manifest = write_store(remote(tmp_path), PLAN, ROWS)
    location = remote(tmp_path, cache_bytes=2 * max(shard.bytes for shard in manifest.shards))
    for index in (0, 1, 0, 2):
        shard = manifest.shards[index]
        location.open(shard.name, shard.bytes, shard.sha256).close()
    assert {path.name for path in cached_files(tmp_path)} == {manifest.shards[index].sha256 for index in (0, 2)}


READ_ALL = """
import sys
from support import read_all
from duet.cache.location import location_of
print(*read_all(location_of("s3://stores/s", sys.argv[1], int(sys.argv[2]))).row_ids)
"""


def reading_process(tmp_path: Path, cache_bytes: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "helpers")}
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "cache"), str(cache_bytes)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_shard_is_fetched_once_for_all_processes(server, tmp_path):
    write_store(remote(tmp_path), PLAN, ROWS)
    server.requests.clear()
    readers = [reading_process(tmp_path, 10**9) for _ in range(2)]
    for process in readers:
        out, err = process.communicate()
        assert out.split() == list(ROWS.row_ids), err
    assert same_rows(read_all(remote(tmp_path)), ROWS)
    assert sorted(server.of_shards("GET")) == [f"shard-{index:05d}" for index in range(5)]


def test_readers_of_one_small_cache_do_not_break_each_other(server, tmp_path):
    manifest = write_store(remote(tmp_path), PLAN, ROWS)
    bound = max(shard.bytes for shard in manifest.shards)
    process = reading_process(tmp_path, bound)

    def read(_: int) -> bool:
        return same_rows(read_all(remote(tmp_path, cache_bytes=bound)), ROWS)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(12)))
    assert process.communicate()[0].split() == list(ROWS.row_ids)
    assert cached_bytes(tmp_path) <= bound


def test_a_shard_evicted_as_soon_as_it_is_there_is_read_all_the_same(server, tmp_path, monkeypatch):
    write_store(remote(tmp_path), PLAN, ROWS)

    def replace_and_lose(source: Path, target: Path, original: Callable[..., None] = os.replace) -> None:
        original(source, target)
        os.unlink(target)

    monkeypatch.setattr(os, "replace", replace_and_lose)
    assert same_rows(read_all(remote(tmp_path)), ROWS)
    assert not cached_files(tmp_path)


def test_a_cached_shard_is_hashed_once_per_process(server, tmp_path, monkeypatch):
    write_store(remote(tmp_path), PLAN, ROWS)
    read_all(remote(tmp_path))
    monkeypatch.setattr(reader.hashlib, "file_digest", None)
    assert same_rows(read_all(remote(tmp_path)), ROWS)


@pytest.mark.parametrize("damage", [flip_byte, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_damaged_cached_shard_is_never_read(server, tmp_path, damage):
    """One of the right size is noticed by its hash and dropped; one of another size is fetched anew at once."""
    manifest = write_store(remote(tmp_path), PLAN, ROWS)
    read_all(remote(tmp_path))
    server.requests.clear()
    damage(tmp_path / "cache" / manifest.shards[1].sha256)
    if cached_bytes(tmp_path) == manifest.shard_bytes:
        with pytest.raises(UserError, match=r"s3://stores/s/shard-00001\.arrow is damaged"):
            read_all(remote(tmp_path))
        assert len(cached_files(tmp_path)) == 4
    assert same_rows(read_all(remote(tmp_path)), ROWS)
    assert server.of_shards("GET") == ["shard-00001"]


def damage_flipped(path: str) -> None:
    raw = bytearray(storage().cat_file(path))
    raw[len(raw) // 2] ^= 1
    storage().pipe_file(path, bytes(raw))


DAMAGES = {
    "flipped": damage_flipped,
    "cut": lambda path: storage().pipe_file(path, storage().cat_file(path)[:-1]),
    "empty": lambda path: storage().pipe_file(path, b""),
    "missing": lambda path: storage().rm_file(path),
}


@pytest.mark.parametrize("name", ["shard-00001.arrow", MANIFEST_NAME])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_object_is_refused_by_its_url(server, tmp_path, name, damage):
    location = remote(tmp_path)
    manifest = write_store(location, PLAN, ROWS)
    early = Store(location)  # opened before the damage
    DAMAGES[damage](f"stores/s/{name}")
    handed_out: list[str] = []

    def read(store: Callable[[], Store]) -> None:
        for rows in store().rows():
            handed_out.extend(rows.row_ids)

    url = "s3://stores/s" if (name, damage) == (MANIFEST_NAME, "missing") else location.name_of(name)
    stores = [lambda: Store(location), *([lambda: early] if name != MANIFEST_NAME else [])]
    for store in stores:
        with pytest.raises(UserError) as caught:
            read(store)
        assert url in caught.value.what
    assert len(handed_out) <= 2 * len(stores)  # those of the first shard
    if name != MANIFEST_NAME:
        assert [url in fault for fault in maintain.verify(location, manifest)] == [True]


def refused(capsys, *arguments: str) -> str:
    """Exit code 2 and two lines; returns the first."""
    code = main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == EXIT_USER
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    return lines[0]


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:sesame@stores/s",
        "s3://AKIA:sesame/open@stores/s",
        "s3://sesame@stores/s",
        "s3://stores/s?X-Amz-Signature=sesame",
    ],
)
def test_credentials_in_a_url_are_refused_and_neither_shown_nor_written(tmp_path, capsys, lab_config, url):
    for command in ("inspect", "verify", "ls", "gc"):
        assert "sesame" not in refused(capsys, "cache", command, url)
    config = lab_config(store__dir=url)
    for command in ("teacher-logits", "distill", "run"):
        assert "sesame" not in refused(capsys, command, "--config", str(config))
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_with_the_storage_is_told_in_two_lines(server, tmp_path, capsys, monkeypatch):
    verify = ("cache", "verify")
    assert "Protocol not known" in refused(capsys, *verify, "nope://stores/s")
    assert "s3://nowhere/s is not a store" in refused(capsys, *verify, "s3://nowhere/s")
    assert "Invalid bucket name" in refused(capsys, *verify, "s3://no bucket/s")
    assert "s3://nowhere/s: not found" in refused(capsys, "cache", "ls", "s3://nowhere/s")
    with pytest.raises(UserError, match=r"s3://nowhere/s/plan\.json: not found: .*bucket does not exist"):
        StoreWriter(location_of("s3://nowhere/s", str(tmp_path / "cache")), PLAN)
    server.enforce_credentials(True)
    try:
        assert "Forbidden" in refused(capsys, *verify, "s3://stores/s")
    finally:
        server.enforce_credentials(False)
    with monkeypatch.context() as patch:
        forget_connections()
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        assert "Could not connect" in refused(capsys, *verify, "s3://stores/s")
        forget_connections()
        patch.delenv("AWS_ACCESS_KEY_ID")
        assert "credentials" in refused(capsys, *verify, "s3://stores/s")
    forget_connections()


def test_a_full_local_disk_is_told_as_such(server, tmp_path, monkeypatch):
    write_store(remote(tmp_path), PLAN, ROWS)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage(), "get_file", full)
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'cache'}"):
        read_all(remote(tmp_path))
    assert not cached_files(tmp_path)


def test_a_local_cache_without_locks_is_told_as_such(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "")  # Lustre, unless it is mounted with flock

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"store\.cache_dir: .* without locks: Function not implemented"):
        location_of("memory://stores/s", str(tmp_path)).open("shard", 1, "0" * 64)


def test_stores_are_read_without_torch_and_without_naming_s3fs(server, tmp_path):
    write_store(remote(tmp_path), PLAN, ROWS)
    code = (
        "import sys; from duet.pipeline.cli.main import main\n"
        "codes = [main(['cache', name, 's3://stores/s']) for name in ('inspect', 'verify', 'ls')]\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)\nassert codes == [0, 0, 0], codes"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not [path for path in (ROOT / "cache").glob("*.py") if re.search(r"import (s3fs|boto)", path.read_text())]


@pytest.mark.usefixtures("_signals_are_restored")
def test_an_experiment_on_object_storage(server, tmp_path, lab_config, capsys):
    questions = [{"question": f"Where was person {i} born?", "answer": "In a town."} for i in range(4)]
    data = two_sets(tmp_path, questions)
    config = lab_config(
        data=data, train__epochs=2, train__batch_size=4,
        store={"dir": "s3://stores/lab", "shard_rows": 3, "cache_dir": str(tmp_path / "cache"), "cache_gb": 0.001},
    )  # fmt: skip
    for stage, verb in {"teacher-logits": "wrote 8 rows", "distill": "trained 4 steps"}.items():
        assert main([stage, "--config", str(config)]) == EXIT_DONE
        out = capsys.readouterr().out
        assert verb in out
        assert "s3://stores/lab/" in out
    assert main(["teacher-logits", "--config", str(config)]) == EXIT_DONE
    assert "reused the store" in capsys.readouterr().out
    (folder,) = remote(tmp_path, "lab").folders()
    url, local = f"s3://stores/lab/{folder}", str(tmp_path / "local")
    assert main(["cache", "ls", "s3://stores/lab"]) == EXIT_DONE
    out = capsys.readouterr().out
    assert folder in out.replace("\n", "")
    assert "complete" in out
    for arguments in (
        ["inspect", url],
        ["verify", url],
        ["convert", url, local, "--format", "zarr"],
        ["verify", local],
    ):
        assert main(["cache", *arguments]) == EXIT_DONE
    assert same_rows(read_all(Path(local)), read_all(remote(tmp_path, f"lab/{folder}")))
    assert "is a URL" in refused(capsys, "cache", "gc", "s3://stores/lab")
