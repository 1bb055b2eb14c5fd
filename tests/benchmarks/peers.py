"""Times one on-policy step of GKD here and with Hugging Face's T5 on torch, in the same session.

    python tests/benchmarks/peers.py [--configs config1 config2] [--dtypes float32] [--rounds 3]
    python tests/benchmarks/peers.py --t5x PYTHON    # compare with T5X instead of torch
    python tests/benchmarks/peers.py --configs gpu1 --dtypes bfloat16    # on a GPU

Each measurement is a process of its own. The two implementations take turns, `--rounds` times each,
and the script prints the medians over rounds, their ratio, and the extremes of the rounds' ratios.
The torch step uses `generate` with its cache, dense logits, the generalized JSD and AdamW. In
bfloat16 it runs under autocast with float32 parameters; on a GPU, the teacher's weights are
bfloat16, and a bfloat16 copy of the student samples. Weights are random. The output heads are
untied and give logits with standard deviation 1, as those of gkd_jax do. No sequence ends early.

T5X has no distillation. Its temperature sampling is timed, and a step of its trainer on
cross-entropy with dropout 0.1 and Adafactor, beside the same step of gkd_jax. PYTHON is the
interpreter of an environment with T5X (docs/checkpoints.md, "Staying on T5X").
"""

import argparse
from collections.abc import Callable
import contextlib
import copy
import dataclasses
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Config:
    """What one of gin/bench/config*.gin and gpu1.gin says."""

    vocab_size: int
    inputs: int
    targets: int = 32
    batch: int = 16
    student: tuple[int, ...] = (256, 4, 4, 512)  # d_model, layers, heads, d_ff
    teacher: tuple[int, ...] = (512, 6, 8, 1024)


CONFIGS = {
    "config1": Config(1024, 64),
    "config2": Config(32128, 64),
    "config3": Config(1024, 512),
    "gpu1": Config(32128, 512, 64, 32, (768, 12, 12, 2048), (2048, 24, 32, 5120)),
}
PHASES = ("sample_ms", "score_ms", "update_ms", "step_ms")
T5X_PHASES = ("sample_ms", "sft_ms")


def jsd(log_p: Any, log_q: Any) -> Any:
    """JSD(0.5) of each token from torch log-probabilities [B T V], in nats."""
    import torch

    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def torch_device() -> str:
    """Where torch runs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def in_bfloat16(model: Any, device: str) -> Any:
    """On a GPU a copy of a model with bfloat16 weights, elsewhere the model itself."""
    import torch

    return copy.deepcopy(model).to(torch.bfloat16) if device == "cuda" else model


def torch_step(config: str, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of each phase on torch; `update_ms` includes the teacher, as for gkd_jax."""
    import torch
    from torch.nn.functional import log_softmax
    import transformers

    sizes, device = CONFIGS[config], torch_device()
    low = dtype == "bfloat16"
    torch.manual_seed(0)

    def model(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> Any:
        numbers: dict[str, Any] = {"decoder_start_token_id": 0, "dropout_rate": 0.0, "d_kv": 64}
        made = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=sizes.vocab_size,
                feed_forward_proj="gated-gelu",
                d_model=d_model,
                num_layers=num_layers,
                num_heads=num_heads,
                d_ff=d_ff,
                **numbers,
            )
        )
        head = torch.randn(sizes.vocab_size, d_model, device=device) * d_model**-0.5
        made.lm_head.weight = torch.nn.Parameter(head)
        made.generation_config.eos_token_id = None
        return made

    with torch.device(device):
        student, teacher = model(*sizes.student), model(*sizes.teacher).eval()
        inputs = torch.randint(3, sizes.vocab_size, (sizes.batch, sizes.inputs))
    sampler = student
    if low:
        teacher, sampler = in_bfloat16(teacher, device), in_bfloat16(student, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.0)
    mask = torch.ones_like(inputs)
    autocast = torch.autocast(device, torch.bfloat16, enabled=low)

    def sample() -> Any:
        with torch.no_grad(), autocast if sampler is student else contextlib.nullcontext():
            if sampler is not student:
                sampler.load_state_dict(student.state_dict())
            ids = sampler.generate(
                input_ids=inputs,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=sizes.targets,
                min_new_tokens=sizes.targets,
            )
        return ids  # the start token, then the targets

    def score(ids: Any) -> Any:
        with torch.no_grad(), autocast:
            return teacher(
                input_ids=inputs, attention_mask=mask, decoder_input_ids=ids[:, :-1]
            ).logits.float()

    def update(ids: Any) -> None:
        log_p = log_softmax(score(ids), -1)
        with autocast:
            logits = student(
                input_ids=inputs, attention_mask=mask, decoder_input_ids=ids[:, :-1]
            ).logits
        jsd(log_p, log_softmax(logits.float(), -1)).mean(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    drawn = sample()
    assert drawn.shape == (sizes.batch, sizes.targets + 1), drawn.shape
    phases = {
        "sample_ms": sample,
        "score_ms": lambda: score(drawn),
        "update_ms": lambda: update(drawn),
        "step_ms": lambda: update(sample()),
    }
    return medians(phases, runs)


def t5x_step(config: str, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of T5X's sampling and of a step of its trainer."""
    import functools

    import jax
    import jax.numpy as jnp
    import seqio
    from t5x import adafactor, decoding, models, train_state, trainer
    from t5x.examples.t5 import network

    sizes = CONFIGS[config]
    vocab_size, length = sizes.vocab_size, sizes.inputs
    d_model, num_layers, num_heads, d_ff = sizes.student
    vocabulary = seqio.PassThroughVocabulary(vocab_size, eos_id=-1)  # an EOS that no token is
    model = models.EncoderDecoderModel(
        module=network.Transformer(
            network.T5Config(
                vocab_size=vocab_size,
                dtype=dtype,
                emb_dim=d_model,
                num_heads=num_heads,
                head_dim=64,
                num_encoder_layers=num_layers,
                num_decoder_layers=num_layers,
                mlp_dim=d_ff,
                mlp_activations=("gelu", "linear"),
                dropout_rate=0.1,
            )
        ),
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=adafactor.Adafactor(
            decay_rate=0.8, logical_factor_rules=adafactor.standard_logical_factor_rules()
        ),
        decode_fn=functools.partial(decoding.temperature_sample, topk=0),
    )
    keys = jax.random.split(jax.random.key(0), 4)
    targets = jax.random.randint(keys[0], (sizes.batch, sizes.targets), 3, vocab_size)
    batch = {
        "encoder_input_tokens": jax.random.randint(keys[1], (sizes.batch, length), 3, vocab_size),
        "decoder_input_tokens": jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": jnp.ones_like(targets),
    }
    variables = model.get_initial_variables(keys[2], {name: x.shape for name, x in batch.items()})
    state = train_state.FlaxOptimTrainState.create(model.optimizer_def, variables)
    # T5X's sampling fills in what is 0 in the targets.
    empty = {**batch, "decoder_input_tokens": jnp.zeros_like(targets)}

    @jax.jit
    def sample(params: Any, key: Any) -> Any:
        return model.predict_batch(params, empty, rng=key)

    update = jax.jit(
        functools.partial(trainer.train_with_lr, model=model, num_microbatches=None),
        donate_argnums=0,
    )
    held = [state]

    def sft() -> None:
        held[0] = jax.block_until_ready(update(held[0], batch, 1e-3, keys[3]))[0]

    phases = {
        "sample_ms": lambda: jax.block_until_ready(sample(held[0].params, keys[3])),
        "sft_ms": sft,
    }
    drawn = sample(state.params, keys[3])
    assert drawn.shape == (sizes.batch, sizes.targets), drawn.shape
    assert len({int(x) for x in drawn.ravel()}) > sizes.targets  # not the same token all over
    return medians(phases, runs)


def medians(phases: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """The median milliseconds of each function, in turns; the first two rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in phases}
    for turn in range(runs + 2):
        for name, phase in phases.items():
            began = time.perf_counter()
            phase()
            if "torch" in sys.modules and torch_device() == "cuda":
                sys.modules["torch"].cuda.synchronize()
            if turn >= 2:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def ours(config: str, dtype: str, runs: int, *more: str) -> dict[str, float]:
    """The numbers that `gkd-jax bench` prints."""
    command = [sys.executable, "-m", "gkd_jax", "bench", "--json", f"--runs={runs}", *more]
    command += [f"--gin_file=gin/bench/{config}.gin", f"--gin.DTYPE='{dtype}'"]
    return last_json(command)


def ours_beside_t5x(config: str, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of gkd_jax's sampling and cross-entropy step, with dropout and Adafactor."""
    sft = ("--gin.DIVERGENCE=None", "--gin.ON_POLICY_FRACTION=0.0", "--gin.train.run.teacher=None")
    like = ("--gin.DROPOUT_RATE=0.1", "--gin.OPTIMIZER=@optimizers.adafactor")
    found, trained = ours(config, dtype, runs), ours(config, dtype, runs, *sft, *like)
    names = {"sample": found, "update": trained}
    return {
        f"{to}_{what}": names[name][f"{name}_{what}"]
        for name, to in (("sample", "sample"), ("update", "sft"))
        for what in ("ms", "of_peak")
    }


def last_json(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def parse(configs: list[str], children: list[str], *, t5x: bool = False) -> argparse.Namespace:
    """The options that this script and decoder_peers.py share; configurations of GPUs come last."""
    parser = argparse.ArgumentParser(description="Times GKD's step beside other implementations.")
    on_cpu = [name for name in configs if not name.startswith("gpu")]
    parser.add_argument("--configs", nargs="+", choices=configs, default=on_cpu)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=10, help="of each phase in a process")
    parser.add_argument("--json", metavar="FILE", help="where all numbers of all rounds go")
    parser.add_argument("--child", choices=children, help="that alone, one line of JSON")
    if t5x:
        parser.add_argument("--t5x", metavar="PYTHON", help="of an environment that has T5X")
    return parser.parse_args()


def compare(
    options: argparse.Namespace,
    mine: Callable[[str, str, int], dict[str, float]],
    others: dict[str, tuple[str, tuple[str, ...]]],
    script: str,
) -> None:
    """Prints one row for each configuration, dtype, other implementation and phase.

    Args:
        options: those of `parse`.
        mine: a function (configuration, dtype, runs) -> the numbers of gkd_jax.
        others: the interpreter and the phases of each other implementation.
        script: the file whose `--child` times another implementation.
    """
    names = ("configuration", "dtype", "phase", "gkd_jax ms", "GEMM share")
    names += ("other", "its ms", "ratio", "ratios of the rounds")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    measured = []
    for config in options.configs:
        for dtype in options.dtypes:
            rounds: list[dict[str, dict[str, float]]] = []
            for _ in range(options.rounds):
                found = {"gkd_jax": mine(config, dtype, options.runs)}
                for other, (python, _) in others.items():
                    command = [python, script, f"--child={other}", f"--runs={options.runs}"]
                    command += ["--configs", config, "--dtypes", dtype]
                    found[other] = last_json(command)
                rounds.append(found)
            measured.append({"configuration": config, "dtype": dtype, "rounds": rounds})
            if options.json:
                pathlib.Path(options.json).write_text(json.dumps(measured))
            for other, (_, phases) in others.items():
                for phase in phases:
                    print(f"| {config} | {dtype} | {_row(rounds, other, phase)}", flush=True)


def _row(rounds: list[dict[str, dict[str, float]]], other: str, phase: str) -> str:
    """The cells of a phase: the medians over rounds, and the extremes of the rounds' ratios."""
    mine, theirs = (
        statistics.median(found[name][phase] for found in rounds) for name in ("gkd_jax", other)
    )
    ratios = [found["gkd_jax"][phase] / found[other][phase] for found in rounds]
    share = rounds[0]["gkd_jax"].get(phase.replace("_ms", "_of_peak"))
    cell = "" if share is None else f"{share:.0%}"
    return (
        f"{phase[:-3]} | {mine:.0f} | {cell} | {other} | {theirs:.0f} | {mine / theirs:.2f} | "
        f"{min(ratios):.2f} to {max(ratios):.2f} |"
    )


def main() -> None:
    """Times this script's configurations."""
    options = parse(list(CONFIGS), ["torch", "t5x"], t5x=True)
    if options.child:
        step = torch_step if options.child == "torch" else t5x_step
        print(json.dumps(step(options.configs[0], options.dtypes[0], options.runs)))
    elif options.t5x:
        compare(options, ours_beside_t5x, {"t5x": (options.t5x, T5X_PHASES)}, __file__)
    else:
        compare(options, ours, {"torch": (sys.executable, PHASES)}, __file__)


if __name__ == "__main__":
    main()
