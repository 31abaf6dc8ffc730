"""The loopback Hub, held against the real client: what it serves, whom it refuses, how its faults look from outside."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

# read once, at import: without it, uploads of large files look for a Xet service
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .hub import HubServer

PICTURE = bytes(range(256)) * 40
FILES = {
    "README.md": b"---\nlicense: mit\ntags: [shapes]\n---\n# Shapes\n",
    "train/a.png": PICTURE,
    "train/a.txt": b"a red ring",
    "train/deep/b.txt": b"a blue ring",
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", tree_page_size=3, part_size=2**16) as running:
        yield running


@pytest.fixture
def api(server: HubServer) -> HfApi:
    return HfApi(endpoint=server.endpoint, token=server.token("write"))


def reader(server: HubServer, user: str | None = None) -> HfApi:
    """A client with a read token of `user`, or without any."""
    if user is None:
        return HfApi(endpoint=server.endpoint, token=False)
    server.add_user(user)
    return HfApi(endpoint=server.endpoint, token=server.token("read", user))


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(client: HfApi, repo_id: str, operations: list[Any], message: str, **options: Any) -> str:
    """Commit through the real client; returns the commit id."""
    return str(client.create_commit(repo_id, operations, commit_message=message, **options).oid)


def read_tree(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# -- what it serves


def test_who_am_i(server: HubServer, api: HfApi) -> None:
    server.add_user("user", organizations=("guild",))
    me = api.whoami()
    assert (me["name"], me["auth"]["accessToken"]["role"]) == ("user", "write")
    assert [organization["name"] for organization in me["orgs"]] == ["guild"]
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        HfApi(endpoint=server.endpoint, token="hf_nobody").whoami()


def test_create_repo_and_commit_regular_and_large_files(server: HubServer, api: HfApi) -> None:
    url = api.create_repo("user/lora", private=True)
    assert url == f"{server.endpoint}/user/lora"
    assert api.create_repo("user/lora", exist_ok=True).repo_id == "user/lora"
    with pytest.raises(HfHubHTTPError) as conflict:
        api.create_repo("user/lora")
    assert conflict.value.response.status_code == 409
    weights = os.urandom(50_000)
    made = commit(
        api, "user/lora", [add("lora.safetensors", weights), add("README.md", b"---\nlicense: mit\n---\n")], "first"
    )
    stored = server.files("user/lora")
    assert stored["lora.safetensors"] == weights
    assert stored["README.md"].startswith(b"---")
    assert [each.title for each in server.commits("user/lora")] == ["first", "initial commit"]
    assert server.commits("user/lora")[0].oid == made
    info = api.model_info("user/lora", files_metadata=True)
    assert (info.sha, info.private, info.card_data.license) == (made, True, "mit")
    large = next(sibling for sibling in info.siblings if sibling.rfilename == "lora.safetensors")
    assert (large.lfs.sha256, large.lfs.size) == (hashlib.sha256(weights).hexdigest(), 50_000)
    assert server.count("PUT", "^/uploads/") == 1
    assert not server.leaks


def test_large_upload_in_parts(server: HubServer, api: HfApi) -> None:
    content = os.urandom(3 * 2**16 + 17)
    api.create_repo("user/lora")
    commit(api, "user/lora", [add("big.safetensors", content)], "in parts")
    assert server.files("user/lora")["big.safetensors"] == content
    assert (server.count("PUT", "^/parts/"), server.count("POST", "^/complete/")) == (4, 1)


def test_same_content_again_makes_no_commit(server: HubServer, api: HfApi) -> None:
    api.create_repo("user/lora")
    first = commit(api, "user/lora", [add("a.safetensors", PICTURE), add("a.txt", b"a")], "one")
    again = commit(api, "user/lora", [add("a.safetensors", PICTURE), add("a.txt", b"a")], "two")
    assert again == first
    assert len(server.commits("user/lora")) == 2
    body = b'{"key":"header","value":{"summary":"s"}}\n{"key":"file","value":{"path":"a.txt","content":"YQ=="}}'
    request = urllib.request.Request(f"{server.endpoint}/api/models/user/lora/commit/main", body, method="POST")
    request.add_header("Authorization", f"Bearer {server.token('write')}")
    assert first in urllib.request.urlopen(request).read().decode()
    assert len(server.commits("user/lora")) == 2


def test_delete_copy_and_history(server: HubServer, api: HfApi) -> None:
    server.add_dataset("user/shapes", FILES)
    operations = [
        CommitOperationDelete("train/deep/", is_folder=True),
        CommitOperationCopy("train/a.png", "copy.png"),
        CommitOperationDelete("train/a.txt"),
    ]
    commit(api, "user/shapes", operations, "move", repo_type="dataset")
    assert set(server.files("user/shapes")) == {".gitattributes", "README.md", "train/a.png", "copy.png"}
    assert server.files("user/shapes")["copy.png"] == PICTURE
    titles = [each.title for each in api.list_repo_commits("user/shapes", repo_type="dataset")]
    assert titles == ["move", "add files", "initial commit"]
    with pytest.raises(RemoteEntryNotFoundError):
        commit(api, "user/shapes", [CommitOperationDelete("none.txt")], "no", repo_type="dataset")


def test_parent_commit_lets_one_of_many_writers_win(server: HubServer, api: HfApi) -> None:
    api.create_repo("user/lora")
    parent = api.model_info("user/lora").sha

    def write(number: int) -> int:
        try:
            commit(api, "user/lora", [add(f"{number}.txt", b"x")], f"{number}", parent_commit=parent)
        except HfHubHTTPError as error:
            return int(error.response.status_code)
        return 200

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(write, range(4))) == [200, 412, 412, 412]
    assert len(server.commits("user/lora")) == 2


def test_branches_tags_and_refs(server: HubServer, api: HfApi) -> None:
    server.add_model("user/lora", {"a.txt": b"1"})
    first = api.model_info("user/lora").sha
    api.create_branch("user/lora", branch="try/one")
    commit(api, "user/lora", [add("a.txt", b"2")], "on a branch", revision="try/one")
    api.create_tag("user/lora", tag="v1")
    with pytest.raises(HfHubHTTPError):
        api.create_tag("user/lora", tag="v1")
    refs = api.list_repo_refs("user/lora")
    assert {ref.name for ref in refs.branches} == {"main", "try/one"}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    assert server.files("user/lora", "try/one")["a.txt"] == b"2"
    assert server.files("user/lora")["a.txt"] == b"1"
    api.delete_branch("user/lora", branch="try/one")
    api.delete_tag("user/lora", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("user/lora", revision="try/one")


def test_snapshot_at_a_commit_stays_as_it_was(server: HubServer, api: HfApi, tmp_path: Path) -> None:
    sha = server.add_dataset("user/shapes", FILES)
    server.add_dataset("user/shapes", {"train/a.txt": b"changed"})
    options = {"repo_type": "dataset", "revision": sha, "cache_dir": tmp_path / "cache", "max_workers": 1}
    folder = api.snapshot_download("user/shapes", **options)
    assert read_tree(folder) == server.files("user/shapes", sha)
    assert read_tree(folder)["train/a.txt"] == b"a red ring"
    assert not server.leaks
    server.requests.clear()
    assert api.snapshot_download("user/shapes", **options) == folder
    assert server.requests == []
    checked = api.verify_repo_checksums("user/shapes", repo_type="dataset", revision=sha, cache_dir=tmp_path / "cache")
    assert checked.checked_count == len(FILES) + 1
    assert not checked.mismatches


def test_tree_pages_and_last_commits(server: HubServer, api: HfApi) -> None:
    server.add_dataset("user/shapes", FILES)
    sha = server.add_dataset("user/shapes", {"train/a.txt": b"changed"})
    rows = list(api.list_repo_tree("user/shapes", repo_type="dataset", recursive=True, expand=True))
    assert {row.path for row in rows} == {".gitattributes", *FILES, "train", "train/deep"}
    assert server.count("GET", "/tree/") == 3
    changed = {row.path for row in rows if row.last_commit.oid == sha}
    assert changed == {"train", "train/a.txt"}
    top = {row.path for row in api.list_repo_tree("user/shapes", repo_type="dataset")}
    assert top == {".gitattributes", "README.md", "train"}
    inside = {row.path for row in api.list_repo_tree("user/shapes", "train/deep", repo_type="dataset")}
    assert inside == {"train/deep/b.txt"}
    infos = api.get_paths_info("user/shapes", ["train", "train/a.png", "none"], repo_type="dataset")
    assert [info.path for info in infos] == ["train", "train/a.png"]
    assert infos[1].lfs.sha256 == hashlib.sha256(PICTURE).hexdigest()


def test_git_ids_are_those_of_git(server: HubServer, tmp_path: Path) -> None:
    server.add_model("user/plain", {"b.txt": b"b", "b/c.txt": b"c", "b/d/e.txt": b"e", "b-c": b"-"})
    for path, content in server.files("user/plain").items():
        (tmp_path / "work" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / path).write_bytes(content)
    work = tmp_path / "work"
    subprocess.run(["git", "init", "-q", work], check=True)
    # the files of this test are small text, no filter of .gitattributes applies to them
    subprocess.run(["git", "-C", work, "-c", "core.autocrlf=false", "add", "-A"], check=True)
    tree = subprocess.run(["git", "-C", work, "write-tree"], check=True, capture_output=True, text=True)
    listing = subprocess.run(
        ["git", "-C", work, "ls-tree", "-r", "-t", tree.stdout.strip()], check=True, capture_output=True, text=True
    )
    expected = {line.split("\t")[1]: line.split()[2] for line in listing.stdout.splitlines()}
    rows = reader(server).list_repo_tree("user/plain", recursive=True)
    assert {row.path: getattr(row, "blob_id", None) or row.tree_id for row in rows} == expected


def test_state_survives_a_restart(tmp_path: Path) -> None:
    with HubServer(tmp_path) as first:
        sha = first.add_dataset("user/shapes", FILES, private=True)
    with HubServer(tmp_path) as second:
        assert second.commits("user/shapes")[0].oid == sha
        assert second.files("user/shapes")["train/a.png"] == PICTURE
        api = HfApi(endpoint=second.endpoint, token=second.token("read"))
        assert api.dataset_info("user/shapes").private


def test_environment_is_enough_for_a_subprocess(server: HubServer) -> None:
    server.add_dataset("user/shapes", FILES, private=True)
    script = (
        "from huggingface_hub import hf_hub_download as d; print(d('user/shapes','train/a.png',repo_type='dataset'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **server.environment("read")},
        check=True,
        capture_output=True,
        text=True,
    )
    path = Path(done.stdout.strip())
    assert path.read_bytes() == PICTURE
    assert path.is_relative_to(server.environment()["HF_HOME"])


# -- whom it refuses


def test_private_looks_missing(server: HubServer, tmp_path: Path) -> None:
    server.add_dataset("user/secret", FILES, private=True)
    for client in (reader(server), reader(server, "stranger")):
        for repo_id in ("user/secret", "user/none"):
            with pytest.raises(RepositoryNotFoundError):
                client.dataset_info(repo_id)
            with pytest.raises(RepositoryNotFoundError):
                client.hf_hub_download(repo_id, "train/a.txt", repo_type="dataset", cache_dir=tmp_path)
    assert reader(server, "user").dataset_info("user/secret").id == "user/secret"


def test_gated_shows_its_list_but_not_its_files(server: HubServer, tmp_path: Path) -> None:
    server.add_dataset("user/shapes", FILES, gated="manual")
    stranger = reader(server, "stranger")
    assert stranger.dataset_info("user/shapes").gated == "manual"
    assert list(stranger.list_repo_tree("user/shapes", repo_type="dataset"))
    for client in (stranger, reader(server)):
        with pytest.raises(GatedRepoError):
            client.hf_hub_download("user/shapes", "train/a.txt", repo_type="dataset", cache_dir=tmp_path)
    server.grant("user/shapes", "stranger")
    path = stranger.hf_hub_download("user/shapes", "train/a.txt", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"a red ring"


def test_missing_things_have_errors_of_their_own(server: HubServer, api: HfApi, tmp_path: Path) -> None:
    server.add_dataset("user/shapes", FILES)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("user/shapes", "none.txt", repo_type="dataset", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.dataset_info("user/shapes", revision="0" * 40)
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit(api, "user/shapes", [add("README.md", b"---\na: [\n---\n")], "bad card", repo_type="dataset")


def test_only_write_tokens_of_owners_write(server: HubServer, api: HfApi) -> None:
    server.add_model("user/lora", {"a.txt": b"1"})
    server.add_user("stranger")
    tokens = [server.token("read"), server.token("write", "stranger")]
    for token in tokens:
        with pytest.raises(HfHubHTTPError) as refused:
            commit(api, "user/lora", [add("a.txt", b"2")], "no", token=token)
        assert refused.value.response.status_code == 403
        with pytest.raises(HfHubHTTPError):
            api.create_repo("user/other", token=token)
    with pytest.raises(HfHubHTTPError):
        commit(reader(server), "user/lora", [add("a.txt", b"2")], "no")
    server.add_user("stranger", organizations=("user",))
    commit(api, "user/lora", [add("a.txt", b"2")], "yes", token=tokens[1])
    assert server.files("user/lora")["a.txt"] == b"2"


def test_paths_that_leave_the_repository_are_refused(server: HubServer, api: HfApi) -> None:
    server.add_model("user/lora", {"a.txt": b"1"})
    operation = add("fine.txt", b"1")
    for path in ("../up.txt", ".git/config", "a.txt/under.txt"):
        operation.path_in_repo = path
        with pytest.raises(BadRequestError):
            commit(api, "user/lora", [operation], "bad path")
    assert len(server.commits("user/lora")) == 2


def test_storage_refuses_tokens_and_unsigned_requests(server: HubServer, api: HfApi) -> None:
    server.add_dataset("user/shapes", FILES)
    url = api.get_hf_file_metadata(url=f"{server.endpoint}/datasets/user/shapes/resolve/main/train/a.png").location
    assert url.startswith(server.storage_endpoint)
    assert urllib.request.urlopen(url).read() == PICTURE
    leaking = urllib.request.Request(url, headers={"Authorization": f"Bearer {server.token('read')}"})
    for request, status in ((leaking, 400), (url.split("?")[0], 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == status
        refused.value.close()
    assert len(server.leaks) == 1


def test_ranges(server: HubServer) -> None:
    server.add_dataset("user/shapes", {"a.txt": b"0123456789"})
    url = f"{server.endpoint}/datasets/user/shapes/resolve/main/a.txt"
    for asked, part in (("2-4", b"234"), ("7-", b"789"), ("-3", b"789"), ("8-99", b"89")):
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": f"bytes={asked}"})) as answer:
            assert (answer.status, answer.read()) == (206, part)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=10-"}))
    assert refused.value.code == 416
    refused.value.close()


# -- how its faults look from outside


def test_status_faults_hit_as_often_as_scripted(server: HubServer, api: HfApi) -> None:
    server.add_dataset("user/shapes", FILES)
    server.fail("GET", "/api/datasets/user/shapes$", 429, skip=1, retry_after=7)
    server.fail("GET", "/api/datasets/user/shapes$", 500, skip=1)
    assert api.dataset_info("user/shapes").id == "user/shapes"
    for status in (429, 500):
        with pytest.raises(HfHubHTTPError) as failed:
            api.dataset_info("user/shapes")
        assert failed.value.response.status_code == status
        assert failed.value.response.headers.get("Retry-After") == ("7" if status == 429 else None)
    assert api.dataset_info("user/shapes").id == "user/shapes"
    assert not server.faults.pending()
    assert [entry.status for entry in server.requests] == [200, 429, 500, 200]


def test_file_faults_that_the_client_does_and_does_not_survive(
    server: HubServer, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_dataset("user/shapes", FILES)
    # the client resumes after its last whole chunk: with chunks of 10 MB a small file would start again
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)

    def download() -> bytes:
        path = api.hf_hub_download(
            "user/shapes", "train/a.png", repo_type="dataset", cache_dir=tmp_path, force_download=True
        )
        return Path(path).read_bytes()

    server.fail("GET", "^/objects/.*a.png", 429, retry_after=0)
    assert download() == PICTURE
    assert server.count("GET", "^/objects/", 429) == 1
    server.fail("GET", "^/objects/.*a.png", 503)
    with pytest.raises(HfHubHTTPError):
        download()
    server.cut("a.png", after=1000)
    server.requests.clear()
    assert download() == PICTURE
    assert [entry.status for entry in server.requests if entry.method == "GET"] == [200, 206]
    server.corrupt_download("a.png")
    damaged = download()
    assert len(damaged) == len(PICTURE)
    assert damaged != PICTURE
    assert download() == PICTURE
    assert not server.faults.pending()


def test_lost_response_leaves_a_commit(server: HubServer, api: HfApi) -> None:
    api.create_repo("user/lora")
    parent = api.model_info("user/lora").sha
    server.lose_response("POST", "/commit/main")
    with pytest.raises(Exception, match="disconnected"):
        commit(api, "user/lora", [add("a.txt", b"1")], "lost", parent_commit=parent)
    assert [each.title for each in server.commits("user/lora")] == ["lost", "initial commit"]
    again = commit(api, "user/lora", [add("a.txt", b"1")], "lost", parent_commit=parent)
    assert again == server.commits("user/lora")[0].oid
    assert len(server.commits("user/lora")) == 2
    assert server.count("POST", "/commit/", status=0) == 1


def test_a_damaged_upload_shows_in_the_file_list_and_can_be_repaired(server: HubServer, api: HfApi) -> None:
    weights = {"one.safetensors": os.urandom(1000), "parts.safetensors": os.urandom(2**16 + 1), "a.txt": b"text"}
    api.create_repo("user/lora")
    server.corrupt_upload("^/uploads/")
    server.corrupt_upload("^/parts/")
    server.corrupt_upload("/commit/")
    for attempt in (1, 2):
        commit(api, "user/lora", [add(path, data) for path, data in weights.items()], f"attempt {attempt}")
        for info in api.get_paths_info("user/lora", list(weights)):
            data = weights[info.path]
            blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            right = info.lfs.sha256 == hashlib.sha256(data).hexdigest() if info.lfs else info.blob_id == blob
            assert right == (attempt == 2)
            assert info.size == len(data)
            assert (server.files("user/lora")[info.path] == data) == (attempt == 2)


def test_a_held_request_waits_for_the_test(server: HubServer, api: HfApi) -> None:
    server.add_dataset("user/shapes", FILES)
    hold = server.hold("GET", "/api/datasets/")
    found: list[str] = []
    client = threading.Thread(target=lambda: found.append(api.dataset_info("user/shapes").id))
    client.start()
    assert hold.reached.wait(10)
    assert not found
    assert not server.requests
    hold.release.set()
    client.join(10)
    assert found == ["user/shapes"]


def test_an_error_of_the_server_itself_fails_the_test(tmp_path: Path) -> None:
    def serve_without_a_blob() -> None:
        with HubServer(tmp_path) as server:
            server.add_model("user/lora", {"lost.txt": b"text"})
            (tmp_path / "blobs" / server.entries("user/lora")["lost.txt"].oid).unlink()
            with pytest.raises(urllib.error.HTTPError, match="500") as failed:
                urllib.request.urlopen(f"{server.endpoint}/user/lora/resolve/main/lost.txt")
            failed.value.close()

    with pytest.raises(RuntimeError, match=r"lost\.txt"):
        serve_without_a_blob()
