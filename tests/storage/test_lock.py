"""One process writes into a run directory; a second is refused with its name, and the lock of a dead one ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qbert_ray.cli.main import main
from qbert_ray.storage import lock as locking
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.lock import FOLDER, LockedError, check_held, locked
from tests import ROOT
from tests.store import BUCKET, Store

HOLD = """
import sys, time
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.lock import locked
with locked(RunDir(sys.argv[1]), "hold it"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def store():
    store = Store().start()
    before = dict(os.environ)
    os.environ.update(store.environment)
    yield store
    os.environ.clear()
    os.environ.update(before)
    store.stop()


@pytest.fixture(params=["local", "s3"])
def run(request, tmp_path):
    if request.param == "local":
        return RunDir(str(tmp_path / "run"))
    request.getfixturevalue("store")
    return RunDir(f"s3://{BUCKET}/{request.node.name.replace('[', '-').rstrip(']')}")


def claims(run):
    return run.names(FOLDER)


def claim(run, name="other.json", **fields):
    """A claim of another host."""
    content = {
        "host": "far",
        "pid": 7,
        "place": "elsewhere",
        "started": "1",
        "since": "noon",
        "command": "qbert-ray run",
        "held": True,
    } | fields
    run.write_json(f"{FOLDER}/{name}", content)


def test_a_second_process_is_refused_with_who_holds_it_and_may_come_afterwards(run):
    with locked(run, "the first"):
        with pytest.raises(LockedError, match=rf"in use by process {os.getpid()} on .* since 20.*the first"), locked(run, "the second"):
            pass
        assert len(claims(run)) == 1
    assert claims(run) == []
    with locked(run, "the third"):
        pass


def test_a_command_that_writes_nothing_leaves_nothing(tmp_path):
    new, own = RunDir(str(tmp_path / "new")), RunDir(str(tmp_path / "own"))
    Path(own.path()).mkdir()
    for run in (new, own):
        with pytest.raises(ZeroDivisionError), locked(run):
            1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["own"] and not own.folders("")
    with locked(new), pytest.raises(LockedError), locked(new):
        pass
    with locked(new):
        new.write_json("x.json", [1])
    assert new.names("") == ["x.json"] and not new.folders("")


def test_a_lock_that_is_released_between_folder_and_claim_is_no_error(tmp_path, monkeypatch):
    run, made = RunDir(str(tmp_path / "run")), []
    write = RunDir._write

    def gone(self, path, content):
        if not made:
            made.append(path)
            Path(path).parent.rmdir()
        write(self, path, content)

    monkeypatch.setattr(RunDir, "_write", gone)
    with locked(run):
        assert made and len(claims(run)) == 1


def test_reading_takes_no_lock(run):
    run.write_json("x.json", [1])
    with locked(run):
        assert RunDir(run.uri).read_json("x.json") == [1]


def test_the_lock_of_a_killed_process_ends_by_itself(run):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, run.uri], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {holder.pid} .*hold it"), locked(run):
            pass
        holder.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10  # not reaped yet, so its number is still taken
        while locking._started(holder.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        with locked(run):
            assert len(claims(run)) == 1
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_of_another_host_ends_with_its_lease(run, monkeypatch):
    claim(run)
    with pytest.raises(LockedError, match="process 7 on far since noon"), locked(run):
        pass
    assert claims(run) == ["other.json"]
    monkeypatch.setattr(locking, "LEASE_SECONDS", 1.0)
    time.sleep(2.1)  # an object store counts whole seconds
    with locked(run):
        assert "other.json" not in claims(run)


def test_a_number_that_is_used_again_is_another_process(run):
    with locked(run):
        content = run.read_json(f"{FOLDER}/{claims(run)[0]}")
    claim(run, **{**content, "started": "0"})
    with locked(run):
        assert "other.json" not in claims(run)


def test_a_holder_renews_and_notices_when_its_claim_was_taken(run, monkeypatch):
    monkeypatch.setattr(locking, "RENEW_SECONDS", 0.05)
    with locked(run) as lock:
        path = f"{FOLDER}/{lock.name}"
        run.write_bytes(path, b"{}")
        _until(lambda: run.read_bytes(path) != b"{}")
        check_held(run)
        claim(run, since="later")
        run.delete(path)  # the renewal may be about to write it again
        _until(lambda: lock.lost)
        with pytest.raises(LockedError, match="lost the lock to process 7 on far since later"):
            check_held(run)
    check_held(run)


def _until(true):
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_many_that_start_at_once_never_two_hold(tmp_path):
    run, inside, most, entered = RunDir(str(tmp_path)), [], [], []

    def enter():
        for _ in range(6):
            try:
                with locked(run):
                    inside.append(1)
                    most.append(len(inside))
                    entered.append(1)
                    time.sleep(0.005)
                    inside.pop()
            except LockedError:
                pass

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entered and max(most) == 1 and claims(run) == []


def test_an_unreadable_claim_holds_until_its_lease_ends(tmp_path):
    run = RunDir(str(tmp_path))
    run.write_bytes(f"{FOLDER}/x.json", b"{")
    with pytest.raises(LockedError, match=r"unreadable .lock/x.json"), locked(run):
        pass
    old = time.time() - locking.LEASE_SECONDS - 1
    os.utime(tmp_path / FOLDER / "x.json", (old, old))
    with locked(run):
        pass


@pytest.mark.parametrize("command", [["ingest"], ["run", "--from", "ingest"], ["semantic-ids", "--append"]])
def test_commands_that_write_are_refused_and_change_nothing(tmp_path, command, capsys, monkeypatch):
    monkeypatch.setattr(locking, "LEASE_SECONDS", 600.0)
    run = RunDir(str(tmp_path / "run"))
    run.write_bytes("ingest/items/items-00000.parquet", b"x")
    (tmp_path / "c.yaml").write_text(json.dumps({"run": {"dir": run.uri}, "compute": {"executor": "local"}}))
    claim(run)
    before = {path: path.stat().st_mtime_ns for path in Path(run.uri).rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        main([*command, "-c", str(tmp_path / "c.yaml")])
    assert "is in use by process 7 on far" in capsys.readouterr().err.replace("\n", " ")
    assert {path: path.stat().st_mtime_ns for path in Path(run.uri).rglob("*") if path.is_file()} == before
