"""`convert` refuses wrong input, checks in dry runs, and exports models that ban spare ids."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params
from safetensors.numpy import load_file, save_file
import small_runs

from gkd_jax import convert, load_model, main, sampling
from gkd_jax.models import lm, t5
from gkd_jax.storage import loading, saved_model, tokenizer_files
from gkd_jax.storage.conversion import FORMATS, convert_checkpoint
from gkd_jax.tasks import multi30k
from gkd_jax.text import vocabularies
from gkd_jax.text.word_vocabulary import WordVocabulary


CONFIG = t5.t5_1_1("32x2", vocab_size=64)
PIECES = 50


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same model in each format."""
    folder = tmp_path_factory.mktemp("sources")
    params = random_params(CONFIG)
    saved_model.write_params(str(folder / "gkd"), CONFIG, params, "a hash", PIECES)
    convert.write_hf(str(folder / "hf"), CONFIG, params, num_pieces=PIECES)
    convert.write_t5x(str(folder), CONFIG, params, step=7)
    (folder / "checkpoint_7").rename(folder / "t5x")
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as error:
        main.main(["convert", *arguments])
    return error.value.code


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_a_dry_run_says_what_it_would_write_and_writes_nothing(
    source, to, sources, tmp_path, capsys
):
    output = tmp_path / "new" / "out"
    convert_checkpoint(str(sources / source), str(output), to=to, step=3, dry_run=True)
    said = capsys.readouterr().err
    assert f"can be written to {output}{'/checkpoint_3' if to == 't5x' else ''} as {to}" in said
    assert f"{lm.num_params(lm.abstract_params(CONFIG)):,} parameters" in said
    assert not list(tmp_path.iterdir())


def test_one_step_of_a_run_that_goes_on_is_converted(sources, tmp_path, monkeypatch):
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(sources / "gkd", steps / "5")
    load_params = loading.load_params

    def load_later(*arguments):
        params = random_params(CONFIG, 1)
        saved_model.write_params(str(steps / "6"), CONFIG, params, "a hash", PIECES)
        return load_params(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loading, "load_params", load_later)
        convert_checkpoint(str(tmp_path / "run"), str(tmp_path / "out"), to="t5x")
    _, found = load_model(tmp_path / "out" / "checkpoint_5")
    _, wanted = load_model(sources / "gkd")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("kind", ["empty folder", "folder", "file", "under a file", "remote"])
def test_an_output_that_cannot_be_made_is_wrong_usage(kind, dry_run, sources, tmp_path, capsys):
    output = tmp_path / "out"
    if kind in ("empty folder", "folder"):
        output.mkdir()
    if kind in ("folder", "file", "under a file"):
        file = output / "mine" if kind == "folder" else output
        file.write_text("mine")
    target = {"under a file": f"{output}/deep/er", "remote": "gs://bucket/out"}.get(kind, output)
    before = sorted(tmp_path.rglob("*"))
    flags = ["--dry_run"] if dry_run else []
    assert run(f"--input={sources / 'hf'}", f"--output={target}", "--to=hf", *flags) == 2
    assert "gkd-jax: error: output" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def lose_an_array(folder):
    file = folder / "model.safetensors"
    arrays = load_file(file)
    del arrays["decoder.final_layer_norm.weight"]
    save_file(arrays, file, {"format": "pt"})


DAMAGES = {
    "hf": (lose_an_array, r"decoder\.final_layer_norm\.weight .*missing"),
    "t5x": (
        lambda folder: shutil.rmtree(folder / "target.decoder.decoder_norm.scale"),
        r"target\.decoder\.decoder_norm\.scale",
    ),
}


@pytest.mark.parametrize("source", DAMAGES)
def test_a_dry_run_sees_what_is_missing(source, sources, tmp_path):
    damage, message = DAMAGES[source]
    folder = shutil.copytree(sources / source, tmp_path / source)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_checkpoint(str(folder), str(tmp_path / "out"), to="gkd", dry_run=True)


def test_a_dry_run_stays_off_the_network(tmp_path, capsys):
    convert_checkpoint("gs://bucket/model", str(tmp_path / "out"), to="hf", dry_run=True)
    assert "gs://bucket/model is remote and was not looked at" in capsys.readouterr().err


@pytest.mark.parametrize("to", FORMATS)
def test_it_says_what_it_wrote(to, sources, tmp_path, capsys):
    output = tmp_path / "out"
    convert_checkpoint(str(sources / "gkd"), str(output), to=to)
    written = output / "checkpoint_0" if to == "t5x" else output
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"reading {sources / 'gkd'} (")
    assert f"wrote {written} as {to}" in said[-1]
    expected, found = load_model(str(sources / "gkd"))[1], load_model(str(written))[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if to == "gkd":
        step_folder = saved_model.find_step(str(output))
        assert step_folder is not None
        stored = saved_model.read_description(step_folder)
        assert (stored["vocabulary"], stored["num_pieces"]) == ("a hash", PIECES)


def test_a_converted_checkpoint_keeps_the_step_of_its_source(sources, tmp_path):
    step = tmp_path / "checkpoint_7"
    shutil.copytree(sources / "t5x", step)
    for source, output, to in [(step, "own", "gkd"), (tmp_path / "own", "t5x", "t5x")]:
        convert_checkpoint(str(source), str(tmp_path / output), to=to)
    assert (tmp_path / "t5x" / "checkpoint_7").is_dir()


# Tokenizers ---------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """A run whose student started from a Hugging Face folder with a tokenizer."""
    hf = tmp_path / "hf"
    params = random_params(CONFIG)
    convert.write_hf(str(hf), CONFIG, params)
    texts = [f"word{i} {'abcdefgh'[i % 8] * 3} number {i}" for i in range(40)]
    multi30k.train_sentencepiece(texts, hf / "spiece.model", vocab_size=60)
    (hf / "tokenizer_config.json").write_text('{"extra_ids": 0}')
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    vocabulary = vocabularies.of_folder(str(hf))
    step = tmp_path / "run" / "checkpoints" / "5"
    content = vocabularies.content_hash(vocabulary)
    saved_model.write_params(str(step), CONFIG, params, content, vocabulary.vocab_size)
    tokenizer_files.copy(str(hf), tmp_path / "run")
    return tmp_path


def test_the_tokenizer_that_a_run_carries_is_copied(started, capsys):
    for own in ("gkd", "checkpoints/gkd"):  # the latter is no step of a run
        convert_checkpoint(str(started / "run"), str(started / own), to="gkd")
    sources = ("run", "run/checkpoints/5", "gkd", "checkpoints/gkd", "hf")
    for number, source in enumerate(sources):
        output = started / f"out{number}"
        convert_checkpoint(str(started / source), str(output), to="hf")
        tools = "additional_chat_templates/tool_use.jinja"
        for name in ("spiece.model", "tokenizer_config.json", tools):
            assert (output / name).read_bytes() == (started / "hf" / name).read_bytes()
        generation = json.loads((output / "generation_config.json").read_text())
        expected = [0] if source == "hf" else [0, 60, 61, 62, 63]
        assert generation["suppress_tokens"] == expected
    assert "no tokenizer" not in capsys.readouterr().err


def test_another_tokenizer_than_the_runs_is_not_copied(started, capsys):
    pieces = WordVocabulary(["other"])
    other = vocabularies.content_hash(pieces)
    params = random_params(CONFIG)
    saved_model.write_params(str(started / "run" / "checkpoints" / "9"), CONFIG, params, other)
    convert_checkpoint(str(started / "run"), str(started / "out"), to="hf")
    assert not (started / "out" / "spiece.model").exists()
    assert "no tokenizer was copied" in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_decoder_without_a_tokenizer_would_never_stop_and_is_refused(dry_run, tmp_path, capsys):
    student = small_runs.write_decoder(tmp_path / "student", None, 448, 0).checkpoint
    assert student is not None
    config, params = load_model(student)
    saved_model.write_params(str(tmp_path / "run" / "checkpoints" / "5"), config, params, "other")
    tokenizer_files.copy(student, tmp_path / "run")  # which is of another vocabulary
    flags = ["--dry_run"] if dry_run else []
    asked = (f"--input={tmp_path / 'run'}", f"--output={tmp_path / 'out'}", "--to=hf", *flags)
    assert run(*asked) == 2
    said = capsys.readouterr().err
    assert "no tokenizer of the decoder-only model" in said
    assert str(tmp_path / "run" / "tokenizer") in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "student" / "tokenizer.json").unlink()  # such a folder is taken as it is
    convert_checkpoint(student, str(tmp_path / "out"), to="hf")


# Ids that no piece has ----------------------------------------------------------------------------


@pytest.mark.parametrize(("pieces", "rows"), [(PIECES, 64), (63, 64), (64, 64)])
def test_ids_that_no_piece_has_are_suppressed(pieces, rows, tmp_path):
    params = random_params(CONFIG)
    saved_model.write_params(str(tmp_path / "gkd"), CONFIG, params, "", pieces)
    convert_checkpoint(str(tmp_path / "gkd"), str(tmp_path / "hf"), to="hf")
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [0, *range(pieces, rows)]


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}])
def test_an_exported_model_never_generates_them(options, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = random_params(CONFIG)
    # Training leaves the rows of spare ids as they were: here the likeliest of all.
    kernel = params["decoder"]["logits_dense"]["kernel"]
    params["decoder"]["logits_dense"]["kernel"] = kernel.at[:, PIECES:].multiply(100.0)
    inputs = jnp.asarray(np.random.default_rng(0).integers(2, PIECES, (8, 6)))
    for pieces in (None, PIECES):
        folder = str(tmp_path / f"hf_{pieces}")
        convert.write_hf(folder, CONFIG, params, num_pieces=pieces)
        model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
        torch.manual_seed(0)
        tokens = model.generate(torch.tensor(np.asarray(inputs)), max_new_tokens=8, **options)
        has_spare = bool((tokens >= PIECES).any())
        assert has_spare == (pieces is None)


def test_an_exported_t5_generates_what_gkd_decodes(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = random_params(CONFIG)
    # The two kinds of id that gkd_jax never decodes, the pad and the spare, are the likeliest.
    never = jnp.r_[0, PIECES : CONFIG.vocab_size]
    kernel = params["decoder"]["logits_dense"]["kernel"]
    params["decoder"]["logits_dense"]["kernel"] = kernel.at[:, never].multiply(100.0)
    folder = str(tmp_path / "hf")
    convert.write_hf(folder, CONFIG, params, num_pieces=PIECES)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    inputs = np.random.default_rng(1).integers(2, PIECES, (8, 6))
    tokens = model.generate(torch.tensor(inputs), max_new_tokens=8, do_sample=False, num_beams=1)
    greedy = sampling.SamplingConfig(
        temperature=0.0, banned_ids=sampling.banned_tail(CONFIG, PIECES)
    )
    drawn = sampling.sample(
        CONFIG, params, jnp.asarray(inputs, jnp.int32), max_length=8, sampling=greedy
    )
    expected = np.zeros((8, 8), np.int64)
    expected[:, : tokens.shape[1] - 1] = tokens[:, 1:].numpy()
    np.testing.assert_array_equal(drawn.tokens, expected)
