"""A Hub on loopback, repositories to put on it, and Python processes that know nothing of this checkout."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


ROOT = Path(__file__).resolve().parent.parent
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
PROBE = {  # a kernel that imports a file beside it, as real ones do
    "probe.py": """
import torch
import triton
import triton.language as tl

from .probe_sizes import BLOCK_T


@triton.jit
def _probe_fwd_kernel(x_ptr, y_ptr, size, BLOCK_T: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = offsets < size
    b_x = tl.load(x_ptr + offsets, mask=m_t, other=0.0)
    tl.store(y_ptr + offsets, 3 * b_x, mask=m_t)


def probe(x):
    y = torch.empty_like(x)
    _probe_fwd_kernel[(triton.cdiv(x.numel(), BLOCK_T),)](x, y, x.numel(), BLOCK_T=BLOCK_T)
    return y
""",
    "probe_sizes.py": "BLOCK_T = 16\n",
}


class FakeHub:
    """Serves published folders as huggingface.co does; `requests` records method, path and status of every request."""

    def __init__(self):
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}  # by repository and commit
        self.main: dict[str, str] = {}  # repository -> its newest commit
        self.requests: list[tuple[str, str, int]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def publish(self, repository: str, folder: Path) -> str:
        """Make the folder's files the repository's `main`; returns the commit, by which they stay available."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        commit = hashlib.sha1(repr([(name, _etag(data)) for name, data in files.items()]).encode()).hexdigest()
        self.files[repository, commit] = files
        self.main[repository] = commit
        return commit


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := _API.fullmatch(path):
            repository, kind, revision = match.groups()
            self._answer_json(repository, kind, revision or "main")
        elif match := _FILE.fullmatch(path):
            self._answer_file(*match.groups())
        else:
            self._answer(404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer_json(self, repository: str, kind: str | None, revision: str):
        commit, files = self._look_up(repository, revision)
        if commit is None:
            return
        if kind == "tree":
            answer = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in files.items()
            ]
        else:
            answer = {"id": repository, "sha": commit, "tags": [], "siblings": [{"rfilename": name} for name in files]}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _answer_file(self, repository: str, revision: str, path: str):
        commit, files = self._look_up(repository, revision)
        if commit is None:
            return
        headers = {"X-Repo-Commit": commit}  # on a 404 too, so that the absence is cached
        if path in files:
            self._answer(200, headers | {"ETag": f'"{_etag(files[path])}"'}, files[path])
        else:
            self._answer(404, headers | {"X-Error-Code": "EntryNotFound"})

    def _look_up(self, repository: str, revision: str) -> tuple[str | None, dict[str, bytes]]:
        """Commit and files of a revision; answers the request itself, with 404, where there is none."""
        commit = self.hub.main.get(repository) if revision == "main" else revision
        if (repository, commit) in self.hub.files:
            return commit, self.hub.files[repository, commit]
        self._answer(404, {"X-Error-Code": "RevisionNotFound" if repository in self.hub.main else "RepoNotFound"})
        return None, {}

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b""):
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def copy_sources(folder: Path, kernels: dict[str, str] | None = None) -> Path:
    """Copy what a model repository holds besides weights: the Python files, `kernels/` with these files added to it.

    Other folders get a file each that a loader has no business with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in ROOT.glob("*_bmojo.py"):
        shutil.copy(source, folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in (PROBE if kernels is None else kernels).items():
        (folder / "kernels" / name).write_text(text)
    for name in ("tests", "examples", "convert"):
        (folder / name).mkdir()
        (folder / name / "unrelated.py").write_text("raise RuntimeError('no part of the model')\n")
    return folder


def build_repository(folder: Path, model, kernels: dict[str, str] | None = None) -> Path:
    """A model repository in a folder that is not there yet: sources, configuration with its auto_map, weights."""
    copy_sources(folder, kernels)
    model.save_pretrained(folder)
    return folder


@dataclass
class Outcome:
    """What a Python process left: the JSON it printed last, and what it wrote to stderr."""

    answer: dict
    stderr: str


def run_python(code: str, home: Path, cwd: Path, **environment: str) -> Outcome:
    """Run code in a new Python that starts in `cwd`, with `home` as Hugging Face's cache and no way to this checkout.

    Raises:
        RuntimeError: the process failed; with its output.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "BMOJO_", "TRITON_"))}
    kept.pop("PYTHONPATH", None)
    ours = {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=kept | ours | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return Outcome(json.loads(done.stdout.splitlines()[-1]), done.stderr)
