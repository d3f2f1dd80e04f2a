"""The real huggingface_hub, in processes of its own, against a cache folder or a small hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "a" * 40
ASK = """
import json, sys
from merganser.checkpoints.hub import snapshot
from merganser.errors import RefError
for request in json.loads(sys.argv[1]):
    try:
        folder = snapshot(*request)
        answer = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    except RefError as error:
        answer = str(error)
    print(json.dumps(answer))
"""


def ask(cache: Path, requests: list[tuple[str, str | None]], **environment: str) -> list[list[str] | str]:
    """What `snapshot` answers in a fresh process: the files of the folder, or the error."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    clean |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*", **environment}
    command = [sys.executable, "-c", ASK, json.dumps(requests)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def cached(home: Path, repo: str, files: dict[str, str], revision: str = "main") -> None:
    """A repository in the layout that huggingface_hub keeps: refs, blobs, and a snapshot of links to them."""
    folder = home / "hub" / ("models--" + repo.replace("/", "--"))
    for name in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)
    for number, (name, text) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:040x}"
        blob.write_text(text)
        (folder / "snapshots" / COMMIT / name).symlink_to(blob)


def test_offline_uses_the_cache_and_says_what_it_lacks(tmp_path: Path) -> None:
    cached(tmp_path, "org/safe", {"config.json": "{}", "model.safetensors": "x"})
    cached(tmp_path, "org/torch", {"config.json": "{}", "pytorch_model.bin": "x"})
    cached(tmp_path, "org/part", {"config.json": "{}", "optimizer.bin": "x"})
    requests = [
        ("org/safe", None),
        ("org/safe", "main"),
        ("org/safe", COMMIT),
        ("org/torch", None),
        ("org/part", None),
        ("org/absent", None),
        ("org/safe", "v2"),
        ("org/--bad..name", None),
    ]
    safe = ["config.json", "model.safetensors"]
    answers = ask(tmp_path, requests, HF_HUB_OFFLINE="1")
    assert answers[:4] == [safe, safe, safe, ["config.json", "pytorch_model.bin"]]
    assert "hf:org/part holds no weights" in answers[4]
    for answer, ref in ((answers[5], "hf:org/absent"), (answers[6], "hf:org/safe@v2")):
        assert str(answer).startswith(f"{ref} is not in the cache, or only in part, and the hub is out of reach")
        assert "hint: check the network and that HF_HUB_OFFLINE is not set" in answer
    assert str(answers[7]).startswith("hf:org/--bad..name is not a hub reference")


def test_no_network_is_a_short_refusal(tmp_path: Path) -> None:
    cached(tmp_path, "org/safe", {"model.safetensors": "x"})
    answers = ask(tmp_path, [("org/safe", None), ("org/absent", None)], HF_ENDPOINT="http://127.0.0.1:9")
    assert answers[0] == ["model.safetensors"]
    assert "hf:org/absent is not in the cache, or only in part, and the hub is out of reach" in answers[1]


REPOSITORIES = {
    "org/both": ["README.md", "config.json", "model.py", "model.safetensors", "pytorch_model.bin", "vocab.txt"],
    "org/torch": ["config.json", "optimizer.bin", "pytorch_model.bin", "run.py", "training_args.bin"],
    "org/none": ["config.json", "model.h5"],
    "org/gated": ["config.json", "model.safetensors"],
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: repository information, file tree, files."""

    fetched: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        parts = path.removeprefix("api/models/").split("/")
        repo, verb, revision = "/".join(parts[:2]), "".join(parts[2:3]), "".join(parts[3:4])
        if repo not in REPOSITORIES:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("api/") and verb == "revision":
            siblings = [{"rfilename": name} for name in REPOSITORIES[repo]]
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("api/") and verb == "tree":
            tree = [{"type": "file", "path": name, "size": 3, "oid": name} for name in REPOSITORIES[repo]]
            self.answer(200, json.dumps(tree).encode())
        elif repo == "org/gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            self.server.fetched.append("/".join([repo, *parts[4:]]))  # type: ignore[attr-defined]
            self.answer(200, b"abc", {"ETag": f'"{parts[4]}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.fetched = []  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_download_takes_weights_and_config_and_never_code(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    requests = [
        ("org/both", None),
        ("org/torch", COMMIT),
        ("org/none", None),
        ("org/gated", None),
        ("org/absent", None),
        ("org/both", "v9"),
    ]
    answers = ask(tmp_path, requests, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_DISABLE_XET="1")
    assert answers[0] == ["config.json", "model.safetensors", "vocab.txt"]
    assert answers[1] == ["config.json", "pytorch_model.bin"]
    assert "hf:org/none holds no weights" in answers[2]
    assert answers[3] == "hf:org/gated is gated\nhint: ask for access on its page, then log in with: hf auth login"
    assert str(answers[4]).startswith("hf:org/absent does not exist, or is private\nhint: ")
    assert str(answers[5]).startswith("hf:org/both@v9 has no such revision\nhint: ")
    assert {name.rpartition("/")[2] for name in hub.fetched} == {  # type: ignore[attr-defined]
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "vocab.txt",
    }
    assert "org/both/pytorch_model.bin" not in hub.fetched  # type: ignore[attr-defined]


def test_without_the_extra_the_hint_is_the_install_command(tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    (answer,) = ask(tmp_path, [("org/name", None)], PYTHONPATH=path)
    assert answer == 'hf:org/name needs huggingface_hub, which is missing\nhint: pip install "merganser[hub]"'
