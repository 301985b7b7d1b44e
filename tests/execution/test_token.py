"""Token authentication, as Ray's own command line does it: with what a client must set, a job is submitted, and without it is not."""

import json
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests import ROOT, nodes
from tests.nodes import RAY, Nodes, clean_environment

TOKEN = "ab" * 32
JOB = ["--", "python", "-c", "print(6 * 7)"]
SET = {  # what a client may set, where the cluster asks for a token
    "file": {"RAY_AUTH_MODE": "token"},
    "variable": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HOME": "nowhere"},
    "path": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "home/.ray/auth_token", "HOME": "nowhere"},
}
NOT_ENOUGH = {
    "a file and no mode": ({}, "Authentication required: Unauthorized: Missing authentication token"),
    "another token": ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "cd" * 32}, "Authentication failed: Forbidden: Invalid authentication token"),
}  # fmt: skip


class Head(BaseHTTPRequestHandler):
    """The two addresses of a cluster's dashboard that a submission without waiting asks for, behind a token."""

    def do_GET(self):
        self.answer({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"job_id": "job", "submission_id": "job"})

    def answer(self, content):
        given = self.headers.get("Authorization")
        status = 200 if given == f"Bearer {TOKEN}" else 403 if given else 401
        refused = {401: "Unauthorized: Missing authentication token", 403: "Forbidden: Invalid authentication token"}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(refused[status].encode() if status > 200 else json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def head():
    """Address of a dashboard."""
    server = HTTPServer(("127.0.0.1", 0), Head)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.fixture
def environment(tmp_path):
    """A home with a token in it, as `ray get-auth-token --generate` and a first `ray.init()` leave it, and no word of a mode."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    environment = clean_environment(HOME=str(home))
    del environment["RAY_AUTH_MODE"]

    def with_more(more):
        more = {name: str(tmp_path / value) if name in ("HOME", "RAY_AUTH_TOKEN_PATH") else value for name, value in more.items()}
        return environment | more

    return with_more


def submit(address, environment, *options):
    done = subprocess.run([*RAY, "job", "submit", "--address", address, *options, *JOB], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_a_job_needs_the_mode_and_the_token(head, environment):
    code, said = submit(head, environment(SET["path"]), "--no-wait")
    assert code == 0 and "submitted successfully" in said, said
    code, said = submit(head, environment({}), "--no-wait")
    assert code == 1 and NOT_ENOUGH["a file and no mode"][1] in said, said


@pytest.mark.slow
def test_a_cluster_that_finds_a_token_file_asks_for_the_token(environment, monkeypatch):
    """The same against a real head, which is started with no more than the file in its home."""
    monkeypatch.setattr(nodes, "clean_environment", lambda **more: environment(more))
    there = Nodes(1, dashboard=True)
    try:
        for more in SET.values():
            code, said = submit(there.jobs, environment(more))
            assert code == 0 and "42" in said and "succeeded" in said, said
        for more, expected in NOT_ENOUGH.values():
            code, said = submit(there.jobs, environment(more))
            assert code == 1 and expected in said, said
    finally:
        there.stop()


def test_the_docs_name_what_to_set():
    said = (ROOT / "docs" / "clusters.md").read_text()
    named = set(re.findall(r"RAY_AUTH_\w+", said))
    assert named == {"RAY_AUTH_MODE"} | {name for more in SET.values() for name in more if name.startswith("RAY_")}
    assert all(expected.partition(":")[0] in said for _, expected in NOT_ENOUGH.values())
