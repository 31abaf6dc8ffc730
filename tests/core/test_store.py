"""The store: whole or not there, the first commit wins, and what lies about itself is noticed.

Every test of behaviour runs on a local folder and on a real S3 server over HTTP (moto; Ceph under its marker).
"""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from stages.core.artifact import Blob, Manifest
from stages.core.errors import CorruptBlobError, StoreError, TransientError
from stages.core.fingerprint import digest_bytes
from stages.core.store import Store, StoreSection
from tests.servers.fault_proxy import FaultProxy
from tests.servers.s3 import S3Server

OpenStore = Callable[..., Store]


def manifest(fingerprint: str = "f" * 64, **changes: object) -> Manifest:
    fields = {"stage": "bucket", "fingerprint": fingerprint, "stage_version": 1, "spec": {}, "inputs": {}}
    return Manifest.model_validate({**fields, **changes})


def on_s3(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Store:
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    fields = {"url": f"s3://{server.bucket}/some/prefix", "endpoint_url": server.endpoint}
    return Store(StoreSection.model_validate({**fields, "cache_dir": str(tmp_path / "cache"), **settings}))


@pytest.fixture(params=["file", "moto", pytest.param("ceph", marks=pytest.mark.ceph)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "file":
        return Store(StoreSection(url=f"file://{tmp_path}/store", cache_dir=str(tmp_path / "cache")))
    server: S3Server = request.getfixturevalue(request.param)
    return on_s3(server.with_new_bucket(), tmp_path, monkeypatch)


def test_a_blob_comes_back_as_it_went(store: Store, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    blob = store.put_file(path)
    assert blob == Blob(sha256=digest_bytes(data), bytes=len(data), suffix=".tar")
    assert store.has(blob)
    assert store.fetch(blob).read_bytes() == data
    assert store.put_file(path) == blob


def test_an_empty_blob(store: Store) -> None:
    blob = store.put_bytes(b"", ".jsonl")
    assert store.read_blob(blob) == b""


def test_a_missing_blob_says_what_to_do(store: Store) -> None:
    with pytest.raises(StoreError, match="--force"):
        store.fetch(Blob(sha256="0" * 64, bytes=1))


def test_a_damaged_blob_is_never_handed_out(store: Store) -> None:
    blob = store.put_bytes(b"right", ".tar")
    store.files.put_bytes(blob.path, b"wrong")
    with pytest.raises(CorruptBlobError, match="do not match"):
        store.fetch(blob)


def test_a_damaged_blob_is_repaired_when_that_is_asked_for(store: Store) -> None:
    blob = store.put_bytes(b"right", ".tar")
    store.files.put_bytes(blob.path, b"wrong")
    with store.repairing():
        assert store.put_bytes(b"right", ".tar") == blob
    assert store.read_blob(blob) == b"right"


def test_a_commit_may_replace(store: Store) -> None:
    store.commit(manifest(duration_s=1.0))
    second = manifest(duration_s=2.0)
    assert store.commit(second, replace=True) == second
    assert store.manifest("bucket", second.fingerprint) == second


def test_the_first_commit_wins(store: Store) -> None:
    first, second = manifest(duration_s=1.0), manifest(duration_s=2.0)
    assert store.manifest("bucket", first.fingerprint) is None
    assert store.commit(first) == first
    assert store.commit(second) == first
    assert store.commit(first) == first
    assert store.manifest("bucket", first.fingerprint) == first


def test_a_manifest_of_another_schema_is_refused(store: Store) -> None:
    store.commit(manifest())
    text = store.files.read(manifest().path)
    assert text is not None
    store.files.put_bytes(manifest().path, text.replace(b'"schema_version": 1', b'"schema_version": 99'))
    with pytest.raises(StoreError, match="schema version 99"):
        store.manifest("bucket", "f" * 64)
    store.files.put_bytes(manifest().path, b"{")
    with pytest.raises(StoreError, match="damaged manifest"):
        store.manifest("bucket", "f" * 64)


def test_json_records(store: Store) -> None:
    assert store.get_json("memo/a.json") is None
    assert store.create_json("memo/a.json", {"b": 1})
    assert store.create_json("memo/a.json", {"b": 1})
    assert not store.create_json("memo/a.json", {"b": 2})
    assert store.get_json("memo/a.json") == {"b": 1}
    store.files.put_bytes("memo/a.json", b"{")
    assert store.create_json("memo/a.json", {"b": 2})
    assert store.get_json("memo/a.json") == {"b": 2}
    store.put_json("memo/a.json", {"b": 3})
    assert store.get_json("memo/a.json") == {"b": 3}
    assert store.files.names("memo") == ["a.json"]
    store.files.delete("memo/a.json")
    store.files.delete("memo/a.json")
    assert store.get_json("memo/a.json") is None
    assert store.files.names("nowhere") == []


def test_the_probe_leaves_nothing_behind(store: Store) -> None:
    assert store.probe() is None
    assert store.files.names("runs/.probe") == []


def _race(section: StoreSection, number: int, start: object, answers: object) -> None:
    store = Store(section)
    start.wait()  # type: ignore[attr-defined]
    made = store.commit(manifest(duration_s=float(number)))
    answers.put(made.duration_s)  # type: ignore[attr-defined]


def test_of_many_processes_that_commit_at_once_one_wins(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_race, args=(store.section, number, start, answers)) for number in range(4)]
    for worker in workers:
        worker.start()
    winners = {answers.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(winners) == 1


def test_a_cached_blob_is_not_fetched_again(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_s3(s3.through(fault_proxy), tmp_path, monkeypatch)
    blob = store.put_bytes(b"x" * 1000, ".tar")
    store.fetch(blob)
    before = fault_proxy.count("GET")
    store.fetch(blob)
    assert fault_proxy.count("GET") == before


def test_the_cache_drops_what_was_used_longest_ago(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_s3(moto.with_new_bucket(), tmp_path, monkeypatch, cache_gb=2.5e-6)
    blobs = [store.put_bytes(bytes([number]) * 1000, ".tar") for number in range(4)]
    for number, blob in enumerate(blobs):
        os.utime(store.fetch(blob), (number, number))
    store.fetch(store.put_bytes(b"last" * 250, ".tar"))
    left = {path.stem for path in (tmp_path / "cache" / "blobs").glob("??/*")}
    assert blobs[0].sha256 not in left
    assert len(left) == 2


def test_a_damaged_copy_in_the_cache_is_noticed_and_fetched_again(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_s3(moto.with_new_bucket(), tmp_path, monkeypatch)
    blob = store.put_bytes(b"right", ".tar")
    store.fetch(blob).write_bytes(b"wrong")
    assert store.fetch(blob).read_bytes() == b"right"


def test_a_cached_blob_that_did_not_change_is_hashed_once(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_s3(moto.with_new_bucket(), tmp_path, monkeypatch)
    blob = store.put_bytes(b"right", ".tar")
    os.utime(store.fetch(blob), (1, 1))
    store.fetch(blob)
    hashing = Mock(return_value=blob.sha256)
    monkeypatch.setattr("stages.core.statcache.digest_file", hashing)
    used = store.fetch(blob).stat().st_atime
    assert not hashing.called
    assert used > 1


def test_the_cache_leaves_alone_what_is_in_use(moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = on_s3(moto.with_new_bucket(), tmp_path, monkeypatch, cache_gb=1e-6)
    folder = tmp_path / "cache" / "blobs" / "00"
    folder.mkdir(parents=True)
    of_another, left_over = folder / ".part-young", folder / ".part-old"
    for path, age_s in ((of_another, 7200), (left_over, 2 * 86400)):
        path.write_bytes(b"x" * 5000)
        os.utime(path, (time.time() - age_s,) * 2)
    first = store.fetch(store.put_bytes(b"first" * 200, ".tar"))
    second = store.fetch(store.put_bytes(b"second" * 200, ".tar"))
    assert first.exists()
    assert second.exists()
    assert of_another.exists()
    assert not left_over.exists()


def test_a_busy_server_is_asked_again(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_s3(s3.through(fault_proxy), tmp_path, monkeypatch)
    fault_proxy.answer(503, method="PUT", times=5)
    blob = store.put_bytes(b"data", ".tar")
    fault_proxy.reset(method="GET", times=2)
    assert store.read_blob(blob) == b"data"


def test_a_server_that_stays_broken_is_a_transient_error_after_a_bounded_number_of_requests(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_s3(s3.through(fault_proxy), tmp_path, monkeypatch)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    store.has(Blob(sha256="0" * 64, bytes=1))
    before = fault_proxy.count()
    fault_proxy.answer(500, method="PUT", times=None)
    with pytest.raises(TransientError, match="after 5 attempts"):
        store.put_bytes(b"data", ".tar")
    assert fault_proxy.count() - before <= 5 * 3 + 4


def test_a_lost_answer_is_not_taken_for_a_lost_race(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_s3(s3.through(fault_proxy), tmp_path, monkeypatch)
    fault_proxy.lose_answer(method="PUT", path="manifest.json")
    mine = manifest(duration_s=5.0)
    assert store.commit(mine) == mine


def test_bytes_that_change_on_the_way_up_are_noticed(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto takes a wrong checksum without a word, as several servers do: only reading back tells."""
    store = on_s3(moto.with_new_bucket(), tmp_path, monkeypatch)
    real = store.files.put_file
    sent: list[str] = []

    def flip(source: Path, path: str) -> None:
        sent.append(path)
        data = bytearray(source.read_bytes())
        if len(sent) == 1:
            data[0] ^= 1
        flipped = tmp_path / "flipped"
        flipped.write_bytes(bytes(data))
        real(flipped, path)

    monkeypatch.setattr(store.files, "put_file", flip)
    blob = store.put_bytes(b"precious", ".tar")
    assert len(sent) == 2
    assert store.read_blob(blob) == b"precious"


def test_bytes_that_change_on_the_way_down_are_noticed(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_s3(s3.through(fault_proxy), tmp_path, monkeypatch)
    blob = store.put_bytes(b"precious" * 1000, ".tar")
    fault_proxy.corrupt(method="GET", path="blobs")
    assert store.read_blob(blob) == b"precious" * 1000
    fault_proxy.truncate(100, method="GET", path="blobs")
    other = store.put_bytes(b"other" * 1000, ".tar")
    assert store.read_blob(other) == b"other" * 1000


def test_a_store_that_ignores_create_only_writes_is_found_out(
    rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = rclone.with_new_bucket()
    with pytest.raises(StoreError, match="silently ignores create-only writes"):
        on_s3(server, tmp_path, monkeypatch).probe()
    warning = on_s3(server, tmp_path, monkeypatch, allow_unconditional=True).probe()
    assert warning is not None
    assert "overwrite each other" in warning


def test_a_warning_about_the_store_is_given_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = StoreSection(url=f"{tmp_path}/store", cache_dir=str(tmp_path / "cache"), allow_unconditional=True)
    store = Store(section)

    def create(path: str, data: bytes) -> bool:
        store.files.put_bytes(path, data)
        return True

    monkeypatch.setattr(store.files, "create", create)
    warning = store.probe()
    assert warning is not None
    assert store.probe() == warning


def test_wrong_credentials_and_a_missing_bucket_are_said_plainly(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_s3(moto, tmp_path, monkeypatch, url="s3://no-such-bucket-here/x")
    with pytest.raises(StoreError, match="does not exist"):
        store.probe()
    secret = moto.secret_key
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" * 8)
    wrong = Store(StoreSection(url=f"s3://{moto.bucket}", endpoint_url=moto.endpoint, cache_dir=str(tmp_path / "c")))
    with pytest.raises(StoreError, match="Check the credentials") as caught:
        wrong.probe()
    assert secret not in str(caught.value)
    assert "wrongwrong" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_said_plainly(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(StoreError, match="cannot write to the store"):
        Store(StoreSection(url=f"file://{blocked}/store", cache_dir=str(tmp_path / "c"))).probe()


def test_files_of_the_local_store_are_not_secret_to_the_group(tmp_path: Path) -> None:
    """mkstemp makes files that only their owner may read; a shared folder needs the umask's say."""
    program = (
        "import sys; from pathlib import Path; from stages.core.filesystem import LocalFiles; "
        "LocalFiles(Path(sys.argv[1])).put_bytes('a/b', b'x')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], umask=0o027, check=True)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o640


def test_writing_a_file_leaves_the_umask_of_other_threads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(StoreSection(url=f"file://{tmp_path}/store", cache_dir=str(tmp_path / "cache")))
    asking = Mock(return_value=0o022)
    monkeypatch.setattr(os, "umask", asking)
    store.put_bytes(b"x", ".tar")
    assert not asking.called


def test_an_open_store_holds_no_secret_that_could_be_pickled(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    store = on_s3(moto, tmp_path, monkeypatch)
    store.probe()
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(store.files)


FORK = """
import multiprocessing, sys
from stages.core.store import Store, StoreSection

def fetch(store, blob):
    print(store.files.read(blob.path).decode(), flush=True)

store = Store(StoreSection.model_validate_json(sys.argv[1]))
blob = store.put_bytes(b"from the parent", ".tar")
child = multiprocessing.get_context("fork").Process(target=fetch, args=(store, blob))
child.start()
child.join(60)
sys.exit(child.exitcode)
"""


def test_a_store_opened_before_a_fork_works_after_it(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a process of its own: one that has run a flow cannot fork (Prefect's services fail in the child as it leaves).
    section = on_s3(moto.with_new_bucket(), tmp_path, monkeypatch).section
    program = [sys.executable, "-c", FORK, section.model_dump_json()]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "from the parent\n"), ran.stderr
