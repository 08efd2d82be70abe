"""Bundles by hub id, against a small hub of our own: uploaded, fetched, fetched again, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from edgeskip.runtime.hub.access import names_a_repository

PYTHON = """import sys
import edgeskip
try:
    with edgeskip.load(sys.argv[1], device="cpu", threads=1) as model:
        print(model.complete("abc", max_new_tokens=5).text)
except edgeskip.runtime.errors.EdgeskipError as error:
    sys.exit(f"{error}")
"""


class Hub(BaseHTTPRequestHandler):
    """Repositories by id, each a table of files; those of `gated/...` nobody may read."""

    repositories: dict
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, data=b"", **headers):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name.startswith("gated/"):
            return self.reply(403, {"error": "gated"}, X_Error_Code="GatedRepo")
        files = self.repositories.get(name)
        if files is None:
            return self.reply(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        if parts[0] == "api" and "tree" in parts:
            listed = [
                {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for p, d in files.items()
            ]
            return self.reply(200, listed)
        if parts[0] == "api":
            siblings = [{"rfilename": path} for path in files]
            return self.reply(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings})
        data = files["/".join(parts[4:])]
        return self.reply(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if "Bearer hf_right" not in self.headers.get("Authorization", ""):
            return self.reply(401, {"error": "who are you"})
        if self.path.endswith("/repos/create"):
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repositories.setdefault(name, {})
            return self.reply(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        name = "/".join(self.path.strip("/").split("/")[2:4])
        if "/preupload/" in self.path:
            files = json.loads(data)["files"]
            return self.reply(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if "/commit/" not in self.path:
            return self.reply(200, {})
        for line in map(json.loads, data.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = "0" * 40
        made = {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{commit}", "commitOid": commit}
        return self.reply(200, made | {"success": True})


@pytest.fixture
def hub(tmp_path):
    class Ours(Hub):
        repositories = {}  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Ours)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*words, token="hf_right", endpoint=f"http://127.0.0.1:{server.server_port}", **others):
        variables = {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        variables |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        variables |= others
        python = ("-c", PYTHON) if words[0] == "load" else ("-m", "edgeskip", words[0])
        command = [sys.executable, *python, *map(str, words[1:])]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | variables, cwd=tmp_path, timeout=100
        )

    yield run, Ours.repositories
    server.shutdown()
    server.server_close()


def assert_one_line(run, code, text):
    assert run.returncode == code, run.stderr
    assert text in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_bundle_goes_to_the_hub_and_comes_back(hub, bundles, tmp_path):
    run, repositories = hub
    bundle = bundles("llama-gqa")
    report = {
        "command": "edgeskip bench x",
        "hardware": {"device": "a test"},
        "valid": False,
        "doubts": ["it was busy"],
    }
    report["rows"] = [{"mode": "autoregressive", "num_speculations": 0, "tokens_per_second": 12.5, "speedup": 1.0}]
    (tmp_path / "bench.json").write_text(json.dumps(report))
    checked = {"command": "edgeskip check x", "hardware": {"device": "a\n\ud800test"}, "passed": False, "prompts": 8}
    checked |= {"agreed": {"self-speculative": 7}, "disagreements": [{"is_tie": True}], "lost": None}
    (tmp_path / "check.json").write_text(json.dumps(checked))
    settings = ("--license", "apache-2.0", "--base-model", "meta/base", "--report", tmp_path / "bench.json")
    settings += ("--check", tmp_path / "check.json")
    pushed = run("push", bundle.folder, "me/tiny", *settings)
    assert pushed.returncode == 0, pushed.stderr
    assert set(repositories["me/tiny"]) == {*bundle.manifest.files, "manifest.json", "README.md"}
    _, head, text = repositories["me/tiny"]["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(head)
    assert (card["license"], card["base_model"], card["library_name"]) == ("apache-2.0", "meta/base", "edgeskip")
    assert "2 of 4: layers[:2] draft" in text
    assert "Measured by `edgeskip bench x` on a test:" in text
    assert "| autoregressive | 0 | 12.5 | 1.00 |" in text
    assert "Not a valid measurement: it was busy." in text
    assert "Compared by `edgeskip check x` on a \\ud800test with transformers in fp32: **it does not pass**." in text
    assert "| self-speculative | 7 of 8 |" in text
    ask = ("-p", "abc", "-n", "5", "--device", "cpu", "--threads", "1")
    wanted = run("generate", bundle.folder, *ask).stdout
    repositories["me/tiny"]["secret.txt"] = b"not named by the manifest"
    fetched = run("generate", "me/tiny", *ask)
    assert (fetched.returncode, fetched.stdout) == (0, wanted), fetched.stderr
    loaded = run("load", "me/tiny")
    assert (loaded.returncode, loaded.stdout) == (0, wanted), loaded.stderr
    folder = tmp_path / "cache" / "edgeskip" / "bundles" / "me--tiny"
    assert {path.name for path in folder.iterdir() if path.is_file()} == {*bundle.manifest.files, "manifest.json"}
    offline = run("generate", "me/tiny", *ask, endpoint="http://127.0.0.1:9")
    assert (offline.returncode, offline.stdout) == (0, wanted), offline.stderr


def test_what_the_hub_does_not_give_is_told_in_one_line(hub, bundles):
    run, repositories = hub
    repositories["me/model"] = {"config.json": b"{}"}
    for name, text in {
        "gated/model": "access is gated; accept its licence on its page, then log in with `hf auth login`",
        "none/model": "no such model, and no folder 'none/model' here",
        "me/model": "no manifest.json, so not a bundle; make one with `edgeskip export me/model FOLDER`",
    }.items():
        assert_one_line(run("inspect", name), 4, text)
    assert_one_line(run("load", "gated/model"), 1, "gated/model on the hub: access is gated; accept its licence")
    assert_one_line(run("load", "me/other", HF_HUB_OFFLINE="1"), 1, "the hub was not reached; check the network")
    assert_one_line(run("inspect", "me/other", endpoint="http://127.0.0.1:9"), 4, "the hub was not reached")
    assert_one_line(run("push", bundles("llama-gqa").folder, "me/x", token="hf_wrong"), 4, "you are not logged in")
    no_report = bundles("llama-gqa").folder / "config.json"
    for option, verb in (("--report", "bench"), ("--check", "check")):
        refused = run("push", bundles("llama-gqa").folder, "me/x", option, no_report)
        assert_one_line(refused, 5, f"not a report to show; wanted one of `edgeskip {verb} --json`")
    push = ("push", bundles("llama-gqa").folder, "me/x")
    assert_one_line(run(*push, endpoint="http://127.0.0.1:9"), 4, "me/x on the hub: not reached (ConnectError)")
    assert_one_line(run(*push, HF_HUB_OFFLINE="1"), 4, "not reached, as HF_HUB_OFFLINE says; unset it")
    assert_one_line(run("push", bundles("llama-gqa").folder, "me"), 5, "not a valid hub id; wanted owner/name")


def test_only_what_can_be_no_path_is_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert names_a_repository("owner/name-1.5")
    for name in ("mine/other", "name", "./owner/name", "/owner/name", "owner/name/more", "~/x", "own er/x", "../x"):
        assert not names_a_repository(name)
