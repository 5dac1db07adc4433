"""A model from the hub: the same run as from its folder. The hub is a server on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

import collie_lab as lab
from tests.ranks import losses, run_here

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serves one model as `someone/stories`, and a cache of its own; the files that were fetched."""
    folder, fetched = shared / "models" / "stories260k", list[str]()

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            files = sorted(file for file in folder.iterdir() if file.is_file())
            if path.startswith("api/models/someone/stories/revision/"):
                self._send(json.dumps({"id": "someone/stories", "sha": REVISION,
                                       "siblings": [{"rfilename": file.name} for file in files]}).encode())
            elif path.startswith("api/models/someone/stories/tree/"):
                self._send(json.dumps([{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                                       for file in files]).encode())
            elif path.startswith("someone/stories/resolve/") and (file := folder / path.split("/", 4)[-1]) in files:
                fetched.extend([file.name] * (self.command == "GET"))
                self._send(file.read_bytes())
            else:
                self.send_error(404)

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(body)), "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
                                "X-Repo-Commit": REVISION}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"  # what HF_ENDPOINT sets when the library is imported
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield fetched
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_run_from_the_hub_is_that_from_the_folder(hub: list[str], shared: Path, tmp_path: Path) -> None:
    here = lab.Experiment(
        model=lab.Model(shared / "models" / "stories260k"), training=lab.Training(steps=2, batch_size=4, export=False),
        data=lab.Skills(size=20, test_size=4, max_length=64), adapter=lab.LoRA(r=2))
    there = here.replace(model=lab.Model("someone/stories"))
    assert there.check().ok
    assert set(hub) == {"config.json"}  # weights wait for the ranks
    found = run_here(there, tmp_path / "there")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(hub)
    assert len(hub) == len(set(hub))  # nothing twice
    assert losses(found) == losses(run_here(here, tmp_path / "here"))
    with pytest.raises(lab.CellError, match=r"'someone/else' is neither a folder here .* the hub does not give it"):
        here.replace(model=lab.Model("someone/else")).check().raise_for_errors()
