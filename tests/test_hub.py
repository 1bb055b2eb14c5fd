"""Names on the Hugging Face hub: its own client against a server on this machine, no network."""

import hashlib
import http.server
import json
import pathlib
import sys
import threading

import huggingface_hub
import jax
import numpy as np
import pytest
from small_runs import options

from gkd_jax import convert, load_model
from gkd_jax.models import t5
from gkd_jax.storage import hub, pretrained
from gkd_jax.storage.conversion import convert_checkpoint
from gkd_jax.training import train


pytestmark = pytest.mark.usefixtures("shared_steps")
CONFIG = t5.t5_1_1("32x2", vocab_size=256)
NAME = "someone/small-t5"


class Hub:
    """The part of the hub's API that a download needs; `commits` are branch -> (commit, folder)."""

    def __init__(self):
        self.commits, self.asked = {}, []
        hub_itself = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub_itself.answer(self, body=True)

            def do_HEAD(self):
                hub_itself.answer(self, body=False)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def publish(self, folder):
        commit = hashlib.sha1(str(folder).encode()).hexdigest()
        self.commits["main"] = self.commits[commit] = (commit, pathlib.Path(folder))
        return commit

    def answer(self, request, *, body):
        parts = request.path.strip("/").split("?")[0].split("/")
        self.asked.append(request.path)
        is_ours = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]) == NAME
        found = self.commits.get(parts[5] if parts[0] == "api" else parts[3]) if is_ours else None
        if found is None:
            request.send_response(404)
            request.send_header("X-Error-Code", "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        commit, folder = found
        if parts[0] == "api":
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            files = [{"rfilename": name} for name in sizes]
            tree = [{"type": "file", "oid": "", "path": k, "size": v} for k, v in sizes.items()]
            about = {"id": NAME, "sha": commit, "siblings": files}
            content = json.dumps(tree if parts[4] == "tree" else about).encode()
        else:
            content = (folder / parts[4]).read_bytes()
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("X-Repo-Commit", commit)
        request.send_header("ETag", hashlib.sha256(content).hexdigest())
        request.end_headers()
        if body:
            request.wfile.write(content)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with one model, which this process takes for the real one."""
    monkeypatch.chdir(tmp_path)
    found = Hub()
    download = huggingface_hub.snapshot_download

    def from_here(name, **more):
        return download(name, endpoint=found.url, cache_dir=tmp_path / "cache", **more)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_here)
    found.params = model_folder(tmp_path / "first", 0)
    found.commit = found.publish(tmp_path / "first")
    yield found
    found.server.shutdown()
    found.server.server_close()


def model_folder(folder, seed):
    params = t5.init(CONFIG, jax.random.key(seed))
    convert.write_hf(str(folder), CONFIG, params)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, which nobody asks for")
    return params


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_model_is_downloaded_by_its_name_and_kept(served, tmp_path):
    config, params = load_model(NAME)
    assert config.d_model == CONFIG.d_model
    assert_same(params, served.params)
    assert not any(path.endswith(".bin") for path in served.asked)
    folder, commit = hub.download(NAME)
    assert commit == served.commit
    assert pathlib.Path(folder).is_dir()
    assert hub.download(f"{NAME}@{commit}").folder == folder
    convert_checkpoint(NAME, str(tmp_path / "out"), to="gkd")
    assert_same(load_model(str(tmp_path / "out"))[1], served.params)


def test_a_run_records_its_commit_and_a_resumed_run_keeps_it(served, tmp_path, capsys):
    def run(steps):
        student = pretrained.ModelConfig(checkpoint=NAME)
        train.train(**options(tmp_path / "run", steps=steps, student=student))
        return json.loads((tmp_path / "run" / "run.json").read_text())

    about = run(2)
    assert about["hub"] == {NAME: served.commit}
    assert f"{NAME} is at commit {served.commit}" in capsys.readouterr().err
    model_folder(tmp_path / "second", 1)
    assert served.publish(tmp_path / "second") != served.commit  # the branch has moved
    assert run(3)["hub"] == about["hub"]
    assert "resumed from step 2" in capsys.readouterr().err


def test_a_folder_of_that_name_is_taken_first(served, tmp_path):
    params = model_folder(tmp_path / NAME, 2)
    assert_same(load_model(NAME)[1], params)
    assert not served.asked


@pytest.mark.parametrize("name", ["someone/else", f"{NAME}@no-such-branch"])
def test_what_the_hub_does_not_have_is_one_line(name, served):
    with pytest.raises(FileNotFoundError, match="no such file or folder, and the Hugging") as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_without_the_client_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub, and run this again"):
        load_model(NAME)


def test_paths_are_no_names():
    for path in ("/models/t5", "./models/t5", "gs://bucket/t5", "t5", "a/b/c", "~/t5"):
        assert not hub.is_name(path)


def test_a_dry_run_asks_nobody(served, tmp_path):
    student = pretrained.ModelConfig(checkpoint=NAME)
    with pytest.raises(ValueError, match="a dry run does not look on the Hugging Face hub"):
        train.train(**options(tmp_path / "run", steps=1, student=student), dry_run=True)
    assert not served.asked
