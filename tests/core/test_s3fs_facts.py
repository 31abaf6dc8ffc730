"""What s3fs and S3 servers really do: the facts that the store is built around, held over real HTTP.

A test that fails here after an upgrade does not mean that a server or s3fs is wrong: it means that the store may rely
on something that has changed. Tests on `s3` run on moto, and on Ceph under the marker `ceph`.
"""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import s3fs
from aiohttp import ClientPayloadError
from botocore.exceptions import FlexibleChecksumError

from tests.servers.fault_proxy import FaultProxy
from tests.servers.s3 import S3Server

MIB = 1 << 20
PART_BYTES = 5 * MIB  # the smallest part that S3 takes in a multipart upload
FS_RETRIES = 2
SDK_ATTEMPTS = 1 + 3  # botocore's "max_attempts" (3 in S3Server.storage_options) does not count the first attempt


def filesystem(server: S3Server, **overrides: Any) -> s3fs.S3FileSystem:
    """A filesystem as the store makes them: both layers of retries bounded."""
    fs = s3fs.S3FileSystem(**server.storage_options(**overrides))
    fs.retries = FS_RETRIES
    return fs


def cause_code(error: BaseException) -> str:
    """The server's own error code, which s3fs keeps in the cause."""
    response = getattr(error.__cause__, "response", None)
    assert response is not None, f"{error!r} was not caused by an answer of the server"
    return str(response["Error"]["Code"])


# Who may come in


def test_wrong_secret_is_refused(s3: S3Server) -> None:
    with pytest.raises(PermissionError):
        filesystem(s3, secret="not the secret").pipe_file(f"{s3.bucket}/a", b"a")
    assert s3.keys() == []


# Partial objects


class InterruptedWriteError(Exception):
    """What goes wrong between two writes."""


def write_and_fail(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    raise InterruptedWriteError


def test_an_exception_inside_open_commits_the_partial_object(s3: S3Server) -> None:
    fs = filesystem(s3)
    with pytest.raises(InterruptedWriteError), fs.open(f"{s3.bucket}/partial", "wb") as file:
        write_and_fail(file, b"first half")
    assert s3.read("partial") == b"first half"


def test_an_exception_inside_open_commits_finished_parts_of_a_multipart_upload(s3: S3Server) -> None:
    fs = filesystem(s3)
    with pytest.raises(InterruptedWriteError), fs.open(f"{s3.bucket}/partial", "wb", block_size=PART_BYTES) as file:
        write_and_fail(file, b"x" * (PART_BYTES + MIB))
    assert len(s3.read("partial")) == PART_BYTES + MIB
    assert s3.unfinished_uploads() == []


def test_a_transaction_left_by_an_exception_commits_nothing(s3: S3Server) -> None:
    fs = filesystem(s3)
    with pytest.raises(InterruptedWriteError), fs.transaction, fs.open(f"{s3.bucket}/partial", "wb") as file:
        write_and_fail(file, b"first half")
    assert s3.keys() == []


# Create-only writes


def expect_refusal(server: S3Server, error: OSError) -> None:
    """The two shapes of one refusal: s3fs goes by the wording of the message, which is not the same everywhere."""
    if server.name == "moto":
        assert isinstance(error, FileExistsError)
    else:
        assert not isinstance(error, FileExistsError)
        assert error.errno == errno.EINVAL
    assert cause_code(error) in {"PreconditionFailed", "412"}


def test_a_second_create_is_refused_and_the_first_bytes_stay(s3: S3Server, tmp_path: Path) -> None:
    fs = filesystem(s3)
    url = f"{s3.bucket}/manifest.json"
    (tmp_path / "second").write_bytes(b"second")
    fs.pipe_file(url, b"first", mode="create")
    with pytest.raises(OSError) as piped:
        fs.pipe_file(url, b"second", mode="create")
    with pytest.raises(OSError) as put:
        fs.put_file(str(tmp_path / "second"), url, mode="create")
    with pytest.raises(OSError) as opened, fs.open(url, "xb") as file:
        file.write(b"second")
    expect_refusal(s3, piped.value)
    expect_refusal(s3, put.value)
    expect_refusal(s3, opened.value)
    assert s3.read("manifest.json") == b"first"


def test_an_empty_exclusive_open_overwrites(s3: S3Server) -> None:
    fs = filesystem(s3)
    fs.pipe_file(f"{s3.bucket}/object", b"first", mode="create")
    with fs.open(f"{s3.bucket}/object", "xb"):
        pass
    assert s3.read("object") == b""


def test_the_condition_on_a_multipart_upload_holds_on_some_servers_only(s3: S3Server) -> None:
    fs = filesystem(s3)
    url = f"{s3.bucket}/object"
    fs.pipe_file(url, b"first", mode="create")

    def create_in_parts() -> None:
        with fs.open(url, "xb", block_size=PART_BYTES) as file:
            file.write(b"x" * (PART_BYTES + 1))

    if s3.name == "ceph":
        create_in_parts()
        assert len(s3.read("object")) == PART_BYTES + 1
    else:
        with pytest.raises(FileExistsError):
            create_in_parts()
        assert s3.read("object") == b"first"
        assert s3.unfinished_uploads() == ["object"]  # nobody aborts it: it must be swept


def test_rclone_takes_a_create_for_a_plain_write(rclone: S3Server) -> None:
    server = rclone.with_new_bucket()
    fs = filesystem(server)
    fs.pipe_file(f"{server.bucket}/manifest.json", b"first", mode="create")
    fs.pipe_file(f"{server.bucket}/manifest.json", b"second", mode="create")
    assert server.read("manifest.json") == b"second"


def test_a_create_whose_answer_is_lost_is_refused_by_its_own_object(s3: S3Server, fault_proxy: FaultProxy) -> None:
    fs = filesystem(s3.through(fault_proxy))
    lost = fault_proxy.lose_answer(method="PUT", path="manifest")
    with pytest.raises(OSError) as refused:
        fs.pipe_file(f"{s3.bucket}/manifest.json", b"mine", mode="create")
    expect_refusal(s3, refused.value)
    assert lost.struck == 1
    assert [exchange.status for exchange in fault_proxy.exchanges] == [200, 412]
    assert s3.read("manifest.json") == b"mine"


def test_a_conflict_between_creates_is_not_retried(s3: S3Server, fault_proxy: FaultProxy) -> None:
    fs = filesystem(s3.through(fault_proxy))
    fault_proxy.answer(409, code="ConditionalRequestConflict", method="PUT")
    with pytest.raises(OSError) as conflict:
        fs.pipe_file(f"{s3.bucket}/manifest.json", b"mine", mode="create")
    assert cause_code(conflict.value) == "ConditionalRequestConflict"
    assert conflict.value.errno == errno.EIO
    assert not isinstance(conflict.value, FileExistsError)
    assert fault_proxy.count("PUT") == 1


# Retries


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown")], ids=["500", "503"])
def test_one_refused_attempt_is_made_good(s3: S3Server, fault_proxy: FaultProxy, status: int, code: str) -> None:
    fs = filesystem(s3.through(fault_proxy))
    fault_proxy.answer(status, code=code, method="PUT")
    fault_proxy.answer(status, code=code, method="GET")
    fs.pipe_file(f"{s3.bucket}/object", b"bytes")
    assert fs.cat_file(f"{s3.bucket}/object") == b"bytes"
    assert (fault_proxy.count("PUT"), fault_proxy.count("GET")) == (2, 2)


def test_429_with_a_code_that_aws_does_not_use_is_not_retried(s3: S3Server, fault_proxy: FaultProxy) -> None:
    fs = filesystem(s3.through(fault_proxy))
    fault_proxy.answer(429, code="TooManyRequests", headers={"Retry-After": "1"}, method="PUT")
    with pytest.raises(OSError) as refused:
        fs.pipe_file(f"{s3.bucket}/object", b"bytes")
    assert cause_code(refused.value) == "TooManyRequests"
    assert refused.value.errno == errno.EIO
    assert fault_proxy.count("PUT") == 1


def test_a_reset_and_a_cut_body_are_made_good(s3: S3Server, fault_proxy: FaultProxy) -> None:
    fs = filesystem(s3.through(fault_proxy))
    fault_proxy.reset(method="PUT")
    fault_proxy.truncate(3, method="GET")
    fs.pipe_file(f"{s3.bucket}/object", b"all the bytes")
    assert fs.cat_file(f"{s3.bucket}/object") == b"all the bytes"
    assert (fault_proxy.count("PUT"), fault_proxy.count("GET")) == (2, 2)


def test_a_late_answer_is_waited_for(s3: S3Server, fault_proxy: FaultProxy) -> None:
    fs = filesystem(s3.through(fault_proxy))
    fault_proxy.delay(0.3, method="PUT")
    fs.pipe_file(f"{s3.bucket}/object", b"bytes")
    assert fault_proxy.count("PUT") == 1
    assert s3.read("object") == b"bytes"


def hasty_filesystem(server: S3Server, **overrides: Any) -> s3fs.S3FileSystem:
    """One retry in the SDK, so that waiting between attempts does not take seconds."""
    config = server.storage_options()["config_kwargs"] | {"retries": {"mode": "standard", "max_attempts": 1}}
    return filesystem(server, config_kwargs=config, **overrides)


def test_a_server_that_always_answers_500_costs_one_round_of_attempts(s3: S3Server, fault_proxy: FaultProxy) -> None:
    fault_proxy.answer(500, times=None)
    with pytest.raises(OSError) as refused:
        filesystem(s3.through(fault_proxy)).pipe_file(f"{s3.bucket}/object", b"bytes")
    assert cause_code(refused.value) == "InternalError"
    assert fault_proxy.count() == fault_proxy.count("PUT") == SDK_ATTEMPTS
    # cat_file asks for the size first and gets no further.
    with pytest.raises(OSError):
        hasty_filesystem(s3.through(fault_proxy)).cat_file(f"{s3.bucket}/object")
    assert (fault_proxy.count("HEAD"), fault_proxy.count("GET")) == (2, 0)


def test_slow_down_for_ever_multiplies_the_two_layers_of_retries(s3: S3Server, fault_proxy: FaultProxy) -> None:
    fs = hasty_filesystem(s3.through(fault_proxy), max_concurrency=1)  # no question for the size: GET alone
    fs.pipe_file(f"{s3.bucket}/object", b"bytes")
    fault_proxy.answer(503, code="SlowDown", method="GET", times=None)
    with pytest.raises(OSError) as refused:
        fs.cat_file(f"{s3.bucket}/object")
    assert refused.value.errno == errno.EBUSY
    assert cause_code(refused.value) == "SlowDown"
    assert fault_proxy.count("GET") == 2 * FS_RETRIES


def test_a_body_that_is_always_cut_ends_in_an_error_of_the_http_library(s3: S3Server, fault_proxy: FaultProxy) -> None:
    fs = filesystem(s3.through(fault_proxy))
    fs.pipe_file(f"{s3.bucket}/object", b"bytes")
    fault_proxy.truncate(2, method="GET", times=None)
    with pytest.raises(ClientPayloadError) as cut:
        fs.cat_file(f"{s3.bucket}/object")
    assert not isinstance(cut.value, OSError)
    assert fault_proxy.count("GET") == FS_RETRIES  # the SDK is done before the body is read: only s3fs tries again


# Reading


def test_bytes_changed_on_the_way_are_not_noticed(s3: S3Server, fault_proxy: FaultProxy) -> None:
    fs = filesystem(s3.through(fault_proxy))
    fs.pipe_file(f"{s3.bucket}/object", b"bytes")
    fault_proxy.corrupt(0, method="GET")
    read = fs.cat_file(f"{s3.bucket}/object")
    assert len(read) == len(b"bytes")
    assert read != b"bytes"


def test_a_failed_parallel_download_leaves_a_full_size_file_with_zeros(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    fs = filesystem(s3.through(fault_proxy))
    fs.pipe_file(f"{s3.bucket}/object", b"x" * (3 * MIB))
    # The first GET only asks for the length; of the three ranges after it, all but one are refused.
    fault_proxy.answer(403, code="AccessDenied", method="GET", times=2, skip=2)
    target = tmp_path / "object"
    with pytest.raises(PermissionError):
        fs.get_file(f"{s3.bucket}/object", str(target), chunksize=MIB)
    left = target.read_bytes()
    assert len(left) == 3 * MIB
    assert left.count(0) >= 2 * MIB


def test_a_failed_serial_download_leaves_the_beginning(s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    fs = filesystem(s3.through(fault_proxy))
    fs.pipe_file(f"{s3.bucket}/object", b"x" * MIB)
    fault_proxy.truncate(100_000, method="GET")
    fault_proxy.answer(403, code="AccessDenied", method="GET", times=None)
    target = tmp_path / "object"
    target.write_bytes(b"what was here before")
    with pytest.raises(PermissionError):
        fs.get_file(f"{s3.bucket}/object", str(target))
    assert 0 < len(target.read_bytes()) <= 100_000
    assert set(target.read_bytes()) == {ord("x")}


def test_the_etag_is_not_a_digest_of_the_content(s3: S3Server) -> None:
    fs = filesystem(s3)
    content = b"x" * (PART_BYTES + 1)
    fs.pipe_file(f"{s3.bucket}/whole", content)
    with fs.open(f"{s3.bucket}/parts", "wb", block_size=PART_BYTES) as file:
        file.write(content)
    assert s3.read("whole") == s3.read("parts") == content
    assert fs.info(f"{s3.bucket}/whole")["ETag"] != fs.info(f"{s3.bucket}/parts")["ETag"]


def test_a_range_from_rclone_needs_checksums_only_where_required(rclone: S3Server) -> None:
    server = rclone.with_new_bucket()
    config = {key: value for key, value in server.storage_options()["config_kwargs"].items() if "checksum" not in key}
    with_checksums = filesystem(server, config_kwargs=config)
    with_checksums.pipe_file(f"{server.bucket}/object", b"0123456789")
    assert filesystem(server).cat_file(f"{server.bucket}/object", start=2, end=5) == b"234"
    with pytest.raises(FlexibleChecksumError):  # the sum is the whole object's
        with_checksums.cat_file(f"{server.bucket}/object", start=2, end=5)


# Processes

FORK = """
import os, sys, s3fs
options = {options!r}
path = {path!r}
captured = s3fs.S3FileSystem(**options)
assert captured.cat_file(path) == b"bytes"
child = os.fork()
if child == 0:
    status = 1
    try:
        captured.cat_file(path)
    except RuntimeError as error:
        print("captured:", error, flush=True)
        print("built inside:", s3fs.S3FileSystem(**options).cat_file(path), flush=True)
        status = 0
    finally:
        os._exit(status)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_filesystem_does_not_survive_a_fork_but_one_built_inside_works(s3: S3Server) -> None:
    path = f"{s3.bucket}/object"
    filesystem(s3).pipe_file(path, b"bytes")
    script = FORK.format(options=s3.storage_options(), path=path)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["captured: This class is not fork-safe", "built inside: b'bytes'"]


def test_the_environment_alone_reaches_the_server(s3: S3Server) -> None:
    filesystem(s3).pipe_file(f"{s3.bucket}/object", b"bytes")
    script = f"import s3fs; print(s3fs.S3FileSystem().cat_file('{s3.bucket}/object'))"
    ran = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | s3.environment(), capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.strip() == "b'bytes'", ran.stderr


def test_a_pickled_filesystem_carries_the_secret(moto: S3Server) -> None:
    assert moto.secret_key.encode() in pickle.dumps(filesystem(moto))
