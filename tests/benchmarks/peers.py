"""Times one on-policy step of GKD here and with Hugging Face's T5 on torch, in the same session.

    python tests/benchmarks/peers.py [--configs 1 2 3] [--dtypes float32 bfloat16] [--rounds 3]
    python tests/benchmarks/peers.py --t5x PYTHON    # compare with T5X instead of torch

Each measurement is a process of its own. The two implementations take turns, `--rounds` times each,
and the script prints the medians over rounds and their ratio. The torch step uses `generate` with
its cache, dense logits, the generalized JSD and AdamW; in bfloat16 it runs under autocast with
float32 parameters. Weights are random. The output heads are untied and give logits with standard
deviation 1, as those of gkd_jax do. No sequence ends early.

T5X has no distillation. Its temperature sampling is timed, and a step of its trainer on
cross-entropy with dropout 0.1 and Adafactor, beside the same step of gkd_jax. PYTHON is the
interpreter of an environment with T5X (docs/checkpoints.md, "Staying on T5X").
"""

import argparse
from collections.abc import Callable
import json
import math
import statistics
import subprocess
import sys
import time
from typing import Any


# vocabulary, inputs; the rest is alike: gin/bench/config1.gin to config3.gin
CONFIGS = {1: (1024, 64), 2: (32128, 64), 3: (1024, 512)}
BATCH, TARGETS = 16, 32
STUDENT: dict[str, Any] = {"d_model": 256, "num_layers": 4, "num_heads": 4, "d_ff": 512}
TEACHER: dict[str, Any] = {"d_model": 512, "num_layers": 6, "num_heads": 8, "d_ff": 1024}
PHASES = ("sample_ms", "score_ms", "update_ms", "step_ms")
T5X_PHASES = ("sample_ms", "sft_ms")


def jsd(log_p: Any, log_q: Any) -> Any:
    """JSD(0.5) of each token from torch log-probabilities [B T V], in nats."""
    import torch

    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def torch_step(config: int, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of each phase on torch; `update_ms` includes the teacher, as for gkd_jax."""
    import torch
    from torch.nn.functional import log_softmax
    import transformers

    vocab_size, length = CONFIGS[config]
    torch.manual_seed(0)

    def model(sizes: dict[str, Any]) -> Any:
        numbers: dict[str, Any] = {"decoder_start_token_id": 0, "dropout_rate": 0.0, "d_kv": 64}
        made = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=vocab_size, feed_forward_proj="gated-gelu", **numbers, **sizes
            )
        )
        head = torch.randn(vocab_size, sizes["d_model"]) * sizes["d_model"] ** -0.5
        made.lm_head.weight = torch.nn.Parameter(head)
        made.generation_config.eos_token_id = None
        return made

    student, teacher = model(STUDENT), model(TEACHER).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.0)
    inputs = torch.randint(3, vocab_size, (BATCH, length))
    mask = torch.ones_like(inputs)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def sample() -> Any:
        with torch.no_grad(), autocast:
            ids = student.generate(
                input_ids=inputs,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=TARGETS,
                min_new_tokens=TARGETS,
            )
        return ids  # the start token, then TARGETS of them

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
    assert drawn.shape == (BATCH, TARGETS + 1), drawn.shape
    phases = {
        "sample_ms": sample,
        "score_ms": lambda: score(drawn),
        "update_ms": lambda: update(drawn),
        "step_ms": lambda: update(sample()),
    }
    return medians(phases, runs)


def t5x_step(config: int, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of T5X's sampling and of a step of its trainer."""
    import functools

    import jax
    import jax.numpy as jnp
    import seqio
    from t5x import adafactor, decoding, models, train_state, trainer
    from t5x.examples.t5 import network

    vocab_size, length = CONFIGS[config]
    vocabulary = seqio.PassThroughVocabulary(vocab_size, eos_id=-1)  # an EOS that no token is
    model = models.EncoderDecoderModel(
        module=network.Transformer(
            network.T5Config(
                vocab_size=vocab_size,
                dtype=dtype,
                emb_dim=STUDENT["d_model"],
                num_heads=STUDENT["num_heads"],
                head_dim=64,
                num_encoder_layers=STUDENT["num_layers"],
                num_decoder_layers=STUDENT["num_layers"],
                mlp_dim=STUDENT["d_ff"],
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
    targets = jax.random.randint(keys[0], (BATCH, TARGETS), 3, vocab_size)
    batch = {
        "encoder_input_tokens": jax.random.randint(keys[1], (BATCH, length), 3, vocab_size),
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
    assert drawn.shape == (BATCH, TARGETS), drawn.shape
    assert len({int(x) for x in drawn.ravel()}) > TARGETS  # not the same token all over
    return medians(phases, runs)


def medians(phases: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """The median milliseconds of each function, in turns; the first two rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in phases}
    for turn in range(runs + 2):
        for name, phase in phases.items():
            began = time.perf_counter()
            phase()
            if turn >= 2:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def ours(config: int, dtype: str, runs: int, *more: str) -> dict[str, float]:
    """The numbers that `gkd-jax bench` prints."""
    command = [sys.executable, "-m", "gkd_jax", "bench", "--json", f"--runs={runs}", *more]
    command += [f"--gin_file=gin/bench/config{config}.gin", f"--gin.DTYPE='{dtype}'"]
    return last_json(command)


def ours_beside_t5x(config: int, dtype: str, runs: int) -> dict[str, float]:
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


def main() -> None:
    """Prints one row for each configuration, dtype and phase."""
    parser = argparse.ArgumentParser(description="Times GKD's step beside torch's.")
    parser.add_argument("--configs", type=int, nargs="+", default=sorted(CONFIGS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=10, help="of each phase in a process")
    parser.add_argument("--t5x", metavar="PYTHON", help="of an environment that has T5X")
    parser.add_argument("--child", choices=["torch", "t5x"], help="that alone, one line of JSON")
    options = parser.parse_args()
    if options.child:
        step = torch_step if options.child == "torch" else t5x_step
        print(json.dumps(step(options.configs[0], options.dtypes[0], options.runs)))
        return
    peer, python = ("t5x", options.t5x) if options.t5x else ("torch", sys.executable)
    mine_alone = ours_beside_t5x if options.t5x else ours
    print(f"| configuration | dtype | phase | gkd_jax ms | {peer} ms | ratio | GEMM share |")
    print("|---|---|---|---|---|---|---|")
    for config in options.configs:
        for dtype in options.dtypes:
            command = [python, __file__, f"--child={peer}", f"--runs={options.runs}"]
            command += ["--configs", str(config), "--dtypes", dtype]
            pairs = [
                (mine_alone(config, dtype, options.runs), last_json(command))
                for _ in range(options.rounds)
            ]
            for phase in T5X_PHASES if options.t5x else PHASES:
                mine, theirs = (statistics.median(pair[i][phase] for pair in pairs) for i in (0, 1))
                share = pairs[0][0].get(phase.replace("_ms", "_of_peak"))
                cell = "" if share is None else f"{share:.0%}"
                print(
                    f"| {config} | {dtype} | {phase[:-3]} | {mine:.0f} | {theirs:.0f} | "
                    f"{mine / theirs:.2f} | {cell} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
