"""Publishing to the Hub, through the real client: one commit, never twice, looked at afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core.errors import ConfigError, TransientError
from stages.core.fingerprint import digest_bytes
from tests.publish.conftest import ADAPTER, Bench, make_bench
from tests.servers.hub import HubServer

REPO = "user/ring-lora"


def made(hub: HubServer) -> list[str]:
    """Commits of ours, newest first: the Hub makes the very first one itself."""
    return [commit.title for commit in hub.commits(REPO) if commit.title != "initial commit"]


def is_whole(hub: HubServer, manifest_info: dict[str, object]) -> bool:
    files = hub.files(REPO)
    expected = manifest_info["files"]
    assert isinstance(expected, dict)
    return {path: digest_bytes(files.get(path, b"")) for path in expected} == {
        path: entry["sha256"] for path, entry in expected.items()
    }


def test_one_commit_private_and_whole(hub: HubServer, hub_bench: Bench) -> None:
    hub_bench.stage.check(hub_bench.setting)
    manifest = hub_bench.run()
    assert len(made(hub)) == 1
    assert hub.count("POST", "/commit/") == 1
    assert is_whole(hub, manifest.info)
    assert hub.entries(REPO)[ADAPTER].sha256
    assert manifest.info["commit"] == hub.commits(REPO)[0].oid
    assert manifest.info["url"].startswith(f"{hub.endpoint}/{REPO}")
    assert hub._repository(REPO, "model").private
    assert hub.leaks == []
    assert hub_bench.stage.still_there(hub_bench.setting, manifest) is None


def test_the_same_adapter_is_not_committed_twice(hub: HubServer, hub_bench: Bench) -> None:
    first = hub_bench.run()
    second = hub_bench.run(force=True)
    assert len(made(hub)) == 1
    assert second.info["commit"] == first.info["commit"]


def test_a_new_card_does_not_send_the_adapter_again(hub: HubServer, hub_bench: Bench) -> None:
    hub_bench.run()
    uploads = hub.count("PUT", "^/uploads/")
    publish = hub_bench.config.publish.model_copy(update={"description": "better words"})
    hub_bench.config = hub_bench.config.model_copy(update={"publish": publish})
    hub_bench.run()
    assert len(made(hub)) == 2
    assert b"better words" in hub.files(REPO)["README.md"]
    assert hub.count("PUT", "^/uploads/") == uploads


def test_a_new_adapter_takes_the_old_pictures_away_and_leaves_foreign_files(hub: HubServer, hub_bench: Bench) -> None:
    hub_bench.run()
    hub.add_model(REPO, {"notes.md": b"mine", "images/holiday.png": b"mine"})
    validation = hub_bench.config.validation.model_copy(update={"prompts": ["one only"]})
    hub_bench.config = hub_bench.config.model_copy(update={"validation": validation})
    hub_bench.train(adapter=b"newer " * 300)
    hub_bench.run()
    files = hub.files(REPO)
    assert files[ADAPTER] == b"newer " * 300
    assert {name for name in files if name.startswith("images/")} == {
        "images/before-0.png",
        "images/after-0.png",
        "images/holiday.png",
    }
    assert files["notes.md"] == b"mine"


def test_another_branch_is_made(hub: HubServer, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, {"target": "hub", "repo": REPO, "branch": "v2"})
    bench.run()
    assert ADAPTER in hub.files(REPO, "v2")
    assert ADAPTER not in hub.files(REPO, "main")
    assert b'revision="v2"' in hub.files(REPO, "v2")["README.md"]


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("POST", "/api/repos/create"),
        ("GET", r"/api/models/user/ring-lora/revision/"),
        ("GET", "/tree/"),
        ("POST", "/preupload/"),
        ("POST", "/commit/"),
        ("PUT", "^/uploads/"),
    ],
)
def test_a_busy_hub_is_waited_for(hub: HubServer, hub_bench: Bench, method: str, pattern: str) -> None:
    fault = hub.fail(method, pattern, 503, times=1)
    manifest = hub_bench.run()
    assert fault.times == 0, "the fault was never met"
    assert len(made(hub)) == 1
    assert is_whole(hub, manifest.info)


def test_a_lost_answer_makes_no_second_commit(hub: HubServer, hub_bench: Bench) -> None:
    fault = hub.lose_response("POST", "/commit/")
    manifest = hub_bench.run()
    assert fault.times == 0
    assert len(made(hub)) == 1
    assert manifest.info["commit"] == hub.commits(REPO)[0].oid
    assert is_whole(hub, manifest.info)


@pytest.mark.parametrize("pattern", [r"^/(uploads|parts)/", "/commit/"])
def test_bytes_that_arrive_damaged_are_noticed_and_sent_again(hub: HubServer, hub_bench: Bench, pattern: str) -> None:
    fault = hub.corrupt_upload(pattern)
    manifest = hub_bench.run()
    assert fault.times == 0
    assert is_whole(hub, manifest.info)
    assert len(made(hub)) == 2


def test_bytes_that_always_arrive_damaged_fail_the_stage(hub: HubServer, hub_bench: Bench) -> None:
    hub.corrupt_upload(times=1000)
    with pytest.raises(TransientError, match="is not what was sent"):
        hub_bench.run()
    job = hub_bench.job()
    assert job.lookup() is None


def test_somebody_else_commits_meanwhile(hub: HubServer, hub_bench: Bench) -> None:
    hub_bench.run()
    hub_bench.train(adapter=b"newer " * 300)
    fault = hub.fail("POST", "/commit/", 412, times=1)
    manifest = hub_bench.run()
    assert fault.times == 0
    assert is_whole(hub, manifest.info)
    assert len(made(hub)) == 2


def test_a_hub_that_stays_down_is_a_transient_error(hub: HubServer, hub_bench: Bench) -> None:
    hub.fail("POST", "/commit/", 503, times=1000)
    with pytest.raises(TransientError, match="cannot"):
        hub_bench.run()
    assert made(hub) == []


def test_a_deleted_or_changed_adapter_is_noticed(hub: HubServer, hub_bench: Bench) -> None:
    manifest = hub_bench.run()
    hub.add_model(REPO, {ADAPTER: b"another"})
    assert "was changed" in str(hub_bench.stage.still_there(hub_bench.setting, manifest))
    hub_bench.run()
    assert is_whole(hub, manifest.info)
    publish = hub_bench.config.publish.model_copy(update={"repo": "user/never-made"})
    setting = type(hub_bench.setting)(hub_bench.config.model_copy(update={"publish": publish}), hub_bench.store)
    assert "no longer on the Hub" in str(hub_bench.stage.still_there(setting, manifest))


def test_no_token(hub: HubServer, hub_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        hub_bench.stage.check(hub_bench.setting)


def test_a_token_that_may_only_read(hub: HubServer, hub_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token("read"))
    with pytest.raises(ConfigError, match="may only read"):
        hub_bench.stage.check(hub_bench.setting)
    with pytest.raises(ConfigError, match="may not write"):
        hub_bench.run()


def test_a_token_that_nobody_holds(hub: HubServer, hub_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_not_a_token_of_this_server"
    monkeypatch.setenv("HF_TOKEN", secret)
    with pytest.raises(ConfigError, match="does not accept HF_TOKEN") as caught:
        hub_bench.stage.check(hub_bench.setting)
    assert secret not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_\u00e9")
    with pytest.raises(ConfigError, match="characters that no token has"):
        hub_bench.stage.check(hub_bench.setting)


@pytest.mark.parametrize(("repo", "words"), [("somebody-else/x", "not to somebody-else"), ("user/a--b", "repo_id")])
def test_a_name_that_cannot_be_written(hub: HubServer, tmp_path: Path, repo: str, words: str) -> None:
    bench = make_bench(tmp_path, {"target": "hub", "repo": repo})
    with pytest.raises(ConfigError, match=words):
        bench.stage.check(bench.setting)


def test_an_organisation_of_the_user_is_allowed(hub: HubServer, tmp_path: Path) -> None:
    hub.add_user("user", ("studio",))
    bench = make_bench(tmp_path, {"target": "hub", "repo": "studio/ring"})
    bench.stage.check(bench.setting)
    bench.run()
    assert ADAPTER in hub.files("studio/ring")


def test_the_token_is_nowhere(hub: HubServer, hub_bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    token = hub.token("write")
    hub.lose_response("POST", "/commit/")
    manifest = hub_bench.run()
    output = capfd.readouterr()
    seen = [manifest.model_dump_json(), output.out, output.err, repr(hub_bench.recorder.events)]
    seen += [data.decode(errors="replace") for data in hub.files(REPO).values()]
    seen += [path.read_text(errors="replace") for path in (hub_bench.root / "store").rglob("*") if path.is_file()]
    assert not [text for text in seen if token in text]


@pytest.mark.kill
@pytest.mark.parametrize("arrives", [False, True])
def test_killed_while_committing(hub: HubServer, hub_bench: Bench, tmp_path: Path, arrives: bool) -> None:
    """kill -9 while the commit is on its way, whether or not it still arrives: then again, and there is one commit."""
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.publish.conftest import make_bench\n"
        "make_bench(Path(sys.argv[1]), {'target': 'hub', 'repo': 'user/ring-lora'}).run()\n"
    )
    hold = hub.hold("POST", "/commit/")
    if not arrives:
        hub.fail("POST", "/commit/", 503)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    try:
        assert hold.reached.wait(60)
    finally:
        process.kill()
        process.wait()
        hold.release.set()
    assert hub_bench.job().lookup() is None
    manifest = hub_bench.run()
    assert is_whole(hub, manifest.info)
    assert len(made(hub)) == 1
