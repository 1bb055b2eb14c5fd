"""Whole runs with decoder-only models: frozen teachers of every kind, and rewards of chats."""

import concurrent.futures
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
import small_tokenizers

from gkd_jax import divergences, gkd, rl, sharding
from gkd_jax.batch import Batch
from gkd_jax.evaluation import evaluate, infer, score
from gkd_jax.input.data import DataConfig
from gkd_jax.models.decoder_config import DecoderConfig, Rope
from gkd_jax.sampling import Sample
from gkd_jax.storage import conversion, pretrained
from gkd_jax.tasks import features
from gkd_jax.text import special_ids, vocabularies
from gkd_jax.training import metrics, plan, program, train
from gkd_jax.training.progress import Progress
from gkd_jax.training.recipe import TrainConfig
from gkd_jax.training.rollouts import Rollout
from gkd_jax.training.step_log import Step, StepLog


pytestmark = pytest.mark.usefixtures("shared_steps")


def small(size, vocab_size, num_kv_heads=1, **more):
    del size
    return DecoderConfig(
        vocab_size=vocab_size,
        d_model=16,
        num_heads=2,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        d_ff=32,
        num_layers=2,
        qk_norm=True,
        **more,
    )


def model(**more):
    return pretrained.ModelConfig(architecture=small, size="tiny", **more)


def run(model_dir, **fields):
    """Trains for some steps and returns the losses."""
    train.train(**small_runs.options(model_dir, student=model(), **fields))
    lines = metrics.read(model_dir / "metrics.jsonl")
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_teacher_on_the_host_gives_the_losses_of_one_on_the_device(tmp_path):
    fields = {"steps": 2, "fraction": 1.0, "divergence": divergences.reverse_kl}
    found = [
        run(tmp_path / memory, **fields, teacher=model(param_dtype="int8", memory=memory))
        for memory in ("device", "host")
    ]
    assert len(found[0]) == 2
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def test_a_run_carries_the_tokenizer_of_its_student(tmp_path, monkeypatch, capsys):
    """Through a resumption and a further run, from another working directory, and moved."""
    monkeypatch.chdir(tmp_path)
    small_runs.write_decoder(tmp_path / "student", None, 448, 0)
    (tmp_path / "a.jsonl").write_text('{"inputs": "7 eggs", "targets": "12"}\n' * 8)
    lengths = {"inputs": 16, "targets": 6}
    data = DataConfig(task="./a.jsonl", feature_lengths=lengths, batch_size=8)
    for model_dir, checkpoint, steps in (
        ("first", "./student", 1),
        ("first", "./student", 2),
        ("second", "first", 1),
    ):
        student = pretrained.ModelConfig(checkpoint=checkpoint)
        recipe = small_runs.options(model_dir, steps=steps, student=student, data=data)
        train.train(**recipe, dry_run=True)
        train.train(**recipe)
        if steps == 1 and checkpoint == "./student":
            kept = (
                tmp_path / "first" / "tokenizer" / "kept"
            )  # a resumed run leaves the folder alone
            kept.touch()
    assert kept.exists()
    stated = special_ids.stated(tmp_path / "student")
    assert len(stated["eos_token_id"]) == 2
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "student").rename(tmp_path / "gone")
    (tmp_path / "second").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    conversion.convert_checkpoint("../moved", "hf", to="hf")
    assert special_ids.stated("hf") == stated
    vocabulary = vocabularies.of_folder("hf")
    assert vocabulary == vocabularies.of_folder(tmp_path / "gone")

    asked = {
        "model": pretrained.ModelConfig(checkpoint="../moved"),
        "data": dataclasses.replace(data, task="../a.jsonl"),
        "dry_run": True,
    }
    evaluation = evaluate.EvalConfig(split="train")
    commands = (
        functools.partial(score.run, output="scores"),
        functools.partial(infer.run, output="rows.jsonl", evaluation=evaluation),
        functools.partial(infer.evaluate_checkpoint, output_dir="eval", evaluation=evaluation),
    )
    for command in commands:
        command(**asked)
    assert "32100" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "moved" / "tokenizer")
    for command in commands:
        with pytest.raises(FileNotFoundError, match=r"moved/tokenizer.*, or set VOCABULARY"):
            command(**asked)


def test_rewards_of_chats_read_whole_prompts(tmp_path):
    folder = small_tokenizers.write(tmp_path / "tokenizer", "qwen")
    chats = [f"How many eggs are there, {number}?" for number in range(16)]
    path = tmp_path / "chats.jsonl"
    before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]
    lines = ({"messages": [*before, {"role": "user", "content": chat}]} for chat in chats)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []

    def reward(prompts, outputs, references):
        seen.append((prompts, references))
        return np.asarray([float(len(output)) for output in outputs])

    losses = run(
        tmp_path / "run",
        steps=2,
        data=DataConfig(
            task=str(path),
            vocabulary=str(folder),
            feature_lengths={"inputs": 96, "targets": 6},
            batch_size=8,
        ),
        method=gkd.GKDConfig(
            on_policy_fraction=1.0,
            divergence=divergences.reverse_kl,
            num_samples=2,
            rl=rl.RLConfig(reward=reward, alpha=0.5),
        ),
        teacher=model(),
    )
    assert np.isfinite(losses).all()
    prompts = [prompt for batch, _ in seen for prompt in batch]
    assert len(prompts) == 32  # 2 steps of 8 prompts with 2 samples each
    assert prompts[0::2] == prompts[1::2]
    # The text of a prompt is all that the student read, without the special tokens around turns.
    first = "user\nHello.\nassistant\nYes?\n"
    assert sorted(prompts[0::2]) == sorted(f"{first}user\n{chat}\nassistant\n" for chat in chats)
    assert {reference for _, batch in seen for reference in batch} == {""}


def test_a_sample_is_truncated_if_none_of_its_tokens_is_an_end_id_of_the_run(tmp_path):
    recipe = small_runs.options(
        "",
        steps=1,
        fraction=1.0,
        divergence=divergences.reverse_kl,
        student=model(),
        teacher=model(),
    )["recipe"]
    built = program.build(recipe, 128, eos_ids=(0, 9))
    # Two samples end. One holds a T5's end id 1, an ordinary token here. In the last, id 0 is no
    # end but what fills a row after the last token that counts.
    tokens = jnp.array([[3, 9, 0], [0, 0, 0], [4, 1, 6], [2, 2, 0]])
    weights = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], jnp.float32)
    sample = Sample(tokens, weights, log_probs=-weights)
    batch = Batch(tokens, tokens, weights, input_lengths=jnp.array([3, 3, 3, 3]))
    keys = gkd.step_keys(0, 0)
    rollout = Rollout(batch, batch, keys, built.update, began=0.0, sample=sample)
    seconds = concurrent.futures.Future()
    seconds.set_result(0.1)
    writer = metrics.Writer(str(tmp_path), resume_step=0)
    log = StepLog(writer, Progress(1, start=0, every=1), built)
    values = dict.fromkeys(("loss", "grad_norm", "prompt_tokens", "target_tokens"), 1.0)
    log.add(Step(0, rollout, values, seconds))
    log.flush()
    writer.close()
    (line,) = metrics.read(tmp_path / "metrics.jsonl")
    assert line["train/truncated_fraction"] == 0.5
    assert line["train/sample_length"] == 2.0


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ({"inputs": 48, "targets": 16}, ""),
        ({"inputs": 49, "targets": 16}, "texts of 65 tokens (49 of the prompt and 16 of the answ"),
        ({"inputs": 48, "targets": 15, "teacher_inputs": 60}, "60 of the prompt and 15 of the"),
    ],
)
def test_texts_longer_than_a_model_was_made_for_are_warned_of_once(lengths, said, tmp_path, capfd):
    sizes = {"student": 64, "teacher": 64}
    models = {
        name: pretrained.ModelConfig(
            architecture=functools.partial(small, max_length=length), size="tiny"
        )
        for name, length in sizes.items()
    }
    template = "{inputs} {targets}" if "teacher_inputs" in lengths else None
    data = DataConfig(
        task="arithmetic", feature_lengths=lengths, batch_size=8, teacher_template=template
    )
    options = small_runs.options(
        tmp_path / "run", steps=1, divergence=divergences.reverse_kl, data=data, **models
    )
    train.train(**options, dry_run=True)
    printed = capfd.readouterr().err
    warnings = [line for line in printed.splitlines() if "max_position_embeddings" in line]
    # Only the teacher reads the longer prompts of its own.
    wrong = [name for name in sizes if said and not (name == "student" and "60" in said)]
    assert len(warnings) == len(wrong)
    for name, line in zip(wrong, warnings, strict=True):
        assert said in line
        assert f"the {name} was made for texts of at most 64 " in line


@pytest.mark.parametrize("command", ["eval", "score"])
def test_commands_that_read_one_model_warn_as_well(command, tmp_path, capfd):
    short = functools.partial(small, max_length=64)
    data = DataConfig(task="arithmetic", feature_lengths=small_runs.LENGTHS, batch_size=8)
    chosen = {"model": pretrained.ModelConfig(architecture=short, size="tiny"), "data": data}
    if command == "eval":
        how = evaluate.EvalConfig(target_length=20)  # 48 + 20
        infer.evaluate_checkpoint(**chosen, evaluation=how, output_dir=str(tmp_path), dry_run=True)
    else:
        score.run(**chosen, output=str(tmp_path / "cache"), dry_run=True)
    expected = {"eval": "texts of 68 tokens", "score": "texts of 80 tokens"}
    assert expected[command] in capfd.readouterr().err


def test_a_prompt_without_tokens_is_refused(tmp_path):
    """Behind it, the logits that should predict a token of the target would have seen this token.

    Qwen's tokenizer adds nothing to a text, so that an empty prompt has no token.
    """
    table = {"inputs": ["Ada has", ""], "targets": ["7 eggs", "the fox"]}
    source = features.Table(lambda _: table, ["train"])
    features.register("an_empty_prompt", source=source, metric_fns=[])
    folder = small_tokenizers.write(tmp_path / "tokenizer", "qwen")
    common = {"feature_lengths": small_runs.LENGTHS, "batch_size": 8}
    data = DataConfig(task="an_empty_prompt", vocabulary=str(folder), **common)
    said = r"'inputs' must have one token or more in every row of a batch, and row \d has none"
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", steps=1, data=data)
    with pytest.raises(ValueError, match=said):
        score.run(model=model(), data=data, output=str(tmp_path / "scores"))
    how = evaluate.EvalConfig(split="train")
    with pytest.raises(ValueError, match=said):
        infer.run(model=model(), data=data, evaluation=how, output=str(tmp_path / "out.jsonl"))


def test_the_context_counts_the_scaling_of_yarn():
    rope = Rope(kind="yarn", factor=4.0, original_length=16)
    assert small("tiny", 128, max_length=16, ropes=(rope,)).context_length == 64
    assert small("tiny", 128, max_length=16).context_length == 16
    assert small_runs.small("tiny", 128).context_length is None


def test_a_dry_run_finds_weights_that_are_cut(tmp_path):
    tokenizer = small_tokenizers.train("qwen")
    student = small_runs.write_decoder(tmp_path / "model", tokenizer, 1000, seed=0)
    file = tmp_path / "model" / "model.safetensors"
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"inputs": "How many?", "targets": "Two."}) + "\n")
    options = small_runs.options(
        tmp_path / "run",
        steps=1,
        student=student,
        data=DataConfig(task=str(data), feature_lengths=small_runs.LENGTHS, batch_size=8),
    )
    train.train(**options, dry_run=True)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut, damaged or no safetensors"):
        train.train(**options, dry_run=True)
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    file.unlink()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"no file .*model-00002-of-00002\.safetensors"):
        train.train(**options, dry_run=True)


@pytest.mark.parametrize(("num_kv_heads", "is_said"), [(1, True), (2, False)])
def test_model_info_says_which_key_heads_are_replicated(num_kv_heads, is_said):
    architecture = functools.partial(small, num_kv_heads=num_kv_heads)
    student = pretrained.ModelConfig(architecture=architecture, size="tiny")
    options = small_runs.options(
        "",
        steps=1,
        student=student,
        mesh=sharding.MeshConfig(data=4, tensor=2),
        train=TrainConfig(train_steps=1),
    )
    info = plan.model_info(program.build(options["recipe"], 128))
    wanted = "1 key head does not divide over tensor=2: each device of that axis computes all"
    assert (wanted in info) == is_said
    assert jax.device_count() == 8
