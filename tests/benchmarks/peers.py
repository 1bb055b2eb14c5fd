"""Times one on-policy step of GKD, ours and Hugging Face T5's on torch, in the same run.

    python tests/benchmarks/peers.py [--configs 1 2 3] [--dtypes float32 bfloat16] [--rounds 3]

Each measurement is a process of its own, the two in turn, `--rounds` times each; printed are the
medians over rounds, and their ratio. On torch: `generate` with its cache, dense logits, the
generalized JSD, AdamW; in bfloat16 under autocast, parameters in float32. Weights are random; the
output heads are of their own and give logits of spread 1, as ours do. No sequence ends early.
"""

import argparse
import json
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


def torch_step(config: int, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of each phase on torch; `update_ms` has the teacher in it, as ours has."""
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
        log_q = log_softmax(logits.float(), -1)
        log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
        p, q = log_p.exp(), log_q.exp()
        tokens = 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1)
        tokens.mean(-1).mean().backward()
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
    times: dict[str, list[float]] = {name: [] for name in phases}
    for turn in range(runs + 2):
        for name, phase in phases.items():
            began = time.perf_counter()
            phase()
            if turn >= 2:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def ours(config: int, dtype: str, runs: int) -> dict[str, float]:
    """What `gkd-jax bench` says."""
    command = [sys.executable, "-m", "gkd_jax", "bench", "--json", f"--runs={runs}"]
    command += [f"--gin_file=gin/bench/config{config}.gin", f"--gin.DTYPE='{dtype}'"]
    return _last_json(command)


def _last_json(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints one row a configuration, dtype and phase."""
    parser = argparse.ArgumentParser(description="Times GKD's step beside torch's.")
    parser.add_argument("--configs", type=int, nargs="+", default=sorted(CONFIGS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=10, help="of each phase in a process")
    parser.add_argument("--torch", action="store_true", help="torch alone, one line of JSON")
    options = parser.parse_args()
    if options.torch:
        print(json.dumps(torch_step(options.configs[0], options.dtypes[0], options.runs)))
        return
    print("| configuration | dtype | phase | gkd_jax ms | torch ms | ratio | GEMM share |")
    print("|---|---|---|---|---|---|---|")
    for config in options.configs:
        for dtype in options.dtypes:
            command = [sys.executable, __file__, "--torch", f"--runs={options.runs}"]
            command += ["--configs", str(config), "--dtypes", dtype]
            pairs = [
                (ours(config, dtype, options.runs), _last_json(command))
                for _ in range(options.rounds)
            ]
            for phase in PHASES:
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
