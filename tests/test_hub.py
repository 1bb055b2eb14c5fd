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
from random_models import random_params
from small_runs import LENGTHS, options, small

from gkd_jax import convert, divergences, load_model
from gkd_jax.evaluation import infer, score
from gkd_jax.evaluation.evaluate import EvalConfig
from gkd_jax.evaluation.rewards import Entailment
from gkd_jax.input import named_tasks
from gkd_jax.input.data import DataConfig
from gkd_jax.models import decoder_sizes, t5
from gkd_jax.storage import hub, pretrained
from gkd_jax.storage.conversion import convert_checkpoint
from gkd_jax.tasks import multi30k
from gkd_jax.text import tokenizer_folder, vocabularies
from gkd_jax.training import train, vocabulary_size


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
    params = random_params(CONFIG, seed)
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
    folder = hub.download(NAME)
    assert pathlib.Path(folder).is_dir()
    assert hub.local_copy(NAME) == (folder, {NAME: served.commit})
    assert hub.download(f"{NAME}@{served.commit}") == folder
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


def test_a_dry_run_takes_the_size_s_rows_for_the_vocabulary_of_a_decoder(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"inputs": "7 eggs", "targets": "12"}\n')
    lengths = {"inputs": 16, "targets": 6}
    data = DataConfig(task="./a.jsonl", feature_lengths=lengths, batch_size=8)
    student, teacher = (
        pretrained.ModelConfig(
            architecture=decoder_sizes.qwen3, size=size.lower(), checkpoint=f"Qwen/Qwen3-{size}"
        )
        for size in ("0.6B", "8B")
    )
    fields = {"data": data, "divergence": divergences.reverse_kl, "fraction": 1.0}
    recipe = options(tmp_path / "run", steps=1, student=student, teacher=teacher, **fields)
    train.train(**recipe, dry_run=True)
    said = capsys.readouterr().err
    assert "8,190,735,360 parameters" in said  # of the files on the hub
    assert "not checked: the vocabulary of Qwen/Qwen3-0.6B\n" in said
    assert vocabularies.T5_PATH not in said
    infer.run(
        model=student, data=data, evaluation=EvalConfig(split="train"), output="o", dry_run=True
    )
    assert "32,100" not in (said := capsys.readouterr().err)
    assert "32100" not in said


# Tokenizers ---------------------------------------------------------------------------------------


def tokenizer_of(folder, num_pieces):
    """A folder with a tokenizer, and with weights that a run must not ask for."""
    texts = ["Ada has 3 eggs and finds 4 more", "Ben loses 2 of his 9 coins", "How many are there?"]
    multi30k.train_sentencepiece(texts, folder / "spiece.model", vocab_size=num_pieces)
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 0}')
    (folder / "model.safetensors").write_bytes(b"weights, which a vocabulary does not need")
    return str(folder)


@pytest.fixture
def tokenizer(served, tmp_path):
    """The folder of the tokenizer that the hub has."""
    folder = tokenizer_of(tmp_path / "tokenizer", 34)
    served.commit = served.publish(folder)
    return folder


def data_of(vocabulary, **more):
    rows = [{"inputs": "How many eggs?", "targets": f"{n}"} for n in range(9)]
    path = pathlib.Path("rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"task": str(path.absolute()), "feature_lengths": LENGTHS, "batch_size": 8}
    return DataConfig(**fields, vocabulary=vocabulary, **more)


def test_a_vocabulary_of_the_hub_is_that_of_its_folder(served, tokenizer, tmp_path):
    """A run reads the same batches, keeps the commit, and downloads nothing but the tokenizer."""

    def run(name, vocabulary, steps):
        train.train(**options(tmp_path / name, steps=steps, data=data_of(vocabulary)))
        return json.loads((tmp_path / name / "run.json").read_text())

    about, expected = run("named", NAME, 1), run("folder", tokenizer, 1)
    assert about["hub"] == {NAME: served.commit}
    for part in ("contents", "first_batch", "parameters"):
        assert about[part] == expected[part]
    assert not any("safetensors" in path for path in served.asked)
    served.publish(tokenizer_of(tmp_path / "later", 36))  # the branch has moved
    assert run("named", NAME, 2)["hub"] == about["hub"]
    assert run("other", NAME, 1)["contents"] != about["contents"]


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (infer.run, {"evaluation": EvalConfig(), "output": "out.jsonl"}),
        (infer.evaluate_checkpoint, {"evaluation": EvalConfig(), "output_dir": "out"}),
        (score.run, {"output": "scores"}),
    ],
    ids=["infer", "eval", "score"],
)
def test_every_command_takes_a_vocabulary_of_the_hub(command, more, served, tokenizer, monkeypatch):
    class OpenedError(Exception):
        pass

    def open_task(config, **more):
        raise OpenedError(config.vocabulary)

    monkeypatch.setattr(named_tasks, "open_task", open_task)
    model = pretrained.ModelConfig(architecture=small, size="tiny")
    with pytest.raises(OpenedError) as opened:
        command(model=model, data=data_of(NAME), **more)
    found = vocabularies.of_folder(str(opened.value))
    assert vocabularies.same(found, vocabularies.of_folder(tokenizer))


def test_a_reward_takes_a_vocabulary_of_the_hub(served, tokenizer):
    model = pretrained.ModelConfig(architecture=small, size="tiny")
    ids = [
        Entailment(model=model, vocabulary=name)._encode("Ada has 3 eggs", "3")
        for name in (NAME, tokenizer)
    ]
    assert ids[0] == ids[1]


def test_a_dry_run_and_precompile_leave_a_vocabulary_of_the_hub_alone(served, tokenizer, tmp_path):
    student = pretrained.ModelConfig(size="small")
    run = options(tmp_path / "run", steps=1, data=data_of(NAME), student=student)
    with pytest.raises(ValueError, match=f"no vocabulary at '{NAME}'.* a dry run does not look"):
        train.train(**run, dry_run=True)
    # The number is that of the rows of the model's embedding.
    assert vocabulary_size.num_pieces_of(run["recipe"]) == 32128
    assert not served.asked


def test_a_wrong_vocabulary_is_one_line(served, tmp_path, monkeypatch):
    def refuses(name, message):
        with pytest.raises(FileNotFoundError, match=message) as error:
            train.train(**options(tmp_path / "run", steps=1, data=data_of(name)))
        assert "\n" not in str(error.value)

    refuses("someone/else", "no vocabulary at 'someone/else': .* and the Hugging Face hub gave")
    asked = len(served.asked)
    refuses("models/spiece.model", "vocabulary 'models/spiece.model': there is no such file")
    assert len(served.asked) == asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuses(NAME, f"no vocabulary at '{NAME}': .* pip install huggingface_hub, and run this again")


def test_what_a_tokenizer_is_read_from_is_downloaded(served, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    names = {
        *(tokenizer_folder.TOKENIZER_FILE, tokenizer_folder.CONFIG_FILE),
        *(tokenizer_folder.TEMPLATE_FILE, vocabularies.SENTENCEPIECE_FILE),
        *vocabularies.UNREAD_FILES,
        *("special_tokens_map.json", "generation_config.json", "config.json"),
    }
    for name in names | {"model.safetensors", "model.safetensors.index.json", "vocab.txt"}:
        (folder / name).write_text("{}")
    served.publish(folder)
    found, _ = hub.local_copy(NAME, tokenizer_only=True)
    assert {path.name for path in pathlib.Path(found).iterdir()} == names
