"""Times one on-policy step of GKD with decoder-only models: gkd_jax, transformers and TRL.

    pip install trl==1.16.0
    python tests/benchmarks/decoder_peers.py [--dtypes float32 bfloat16] [--rounds 3] [--runs 10]

The models are those of gin/bench/config4.gin, with random weights; no answer ends early. Each
measurement is a process of its own. The implementations take turns, `--rounds` times each. Printed
are the medians over rounds, and the smallest and largest ratio of gkd_jax to the other in a round.

`torch` is the step that one would write with transformers: `generate` with its cache, logits of the
answers alone (`logits_to_keep`), the generalized JSD and AdamW. `trl` is `GKDTrainer`'s own
`training_step` with lambda 1 and beta 0.5, gradient checkpointing off, then AdamW. In bfloat16
both run under autocast with float32 parameters.
"""

import argparse
from collections.abc import Callable
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import peers


ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BATCH, PROMPT, ANSWER, VOCABULARY = 16, 64, 32, 32_128
# Hidden size, layers, heads, key heads, width of the MLP.
STUDENT = (256, 4, 4, 2, 768)
TEACHER = (512, 6, 8, 4, 1536)
PHASES = ("sample_ms", "score_ms", "update_ms", "step_ms")


def _model(sizes: tuple[int, ...]) -> Any:
    import transformers

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "intermediate_size")
    fields: dict[str, Any] = dict(zip(names, sizes, strict=True))
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, head_dim=64, tie_word_embeddings=True, eos_token_id=None, **fields
    )
    made = transformers.Qwen3ForCausalLM(config)
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made


def torch_step(dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of each phase with transformers; `update_ms` includes the teacher."""
    import torch
    from torch.nn.functional import log_softmax

    torch.manual_seed(0)
    student, teacher = _model(STUDENT), _model(TEACHER).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.0)
    prompts = torch.randint(3, VOCABULARY, (BATCH, PROMPT))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def sample() -> Any:
        with torch.no_grad(), autocast:
            return student.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=ANSWER,
            )

    def logits(model: Any, ids: Any) -> Any:
        with autocast:
            found = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=ANSWER + 1
            )
        return found.logits[:, :-1].float()

    def score(ids: Any) -> Any:
        with torch.no_grad():
            return logits(teacher, ids)

    def update(ids: Any) -> None:
        log_p, log_q = log_softmax(score(ids), -1), log_softmax(logits(student, ids), -1)
        peers.jsd(log_p, log_q).mean(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    drawn = sample()
    assert drawn.shape == (BATCH, PROMPT + ANSWER), drawn.shape
    phases: dict[str, Callable[[], Any]] = {
        "sample_ms": sample,
        "score_ms": lambda: score(drawn),
        "update_ms": lambda: update(drawn),
        "step_ms": lambda: update(sample()),
    }
    return peers.medians(phases, runs)


def trl_step(dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of a whole step of TRL's GKDTrainer."""
    import datasets
    import torch
    import transformers
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    sys.path.insert(0, str(ROOT / "tests"))
    import small_tokenizers

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = small_tokenizers.write(pathlib.Path(folder) / "tokenizer", "qwen")
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        trainer = GKDTrainer(
            model=_model(STUDENT),
            teacher_model=_model(TEACHER),
            args=GKDConfig(
                output_dir=folder,
                lmbda=1.0,
                beta=0.5,
                temperature=1.0,
                max_new_tokens=ANSWER,
                per_device_train_batch_size=BATCH,
                gradient_checkpointing=False,
                learning_rate=3e-4,
                weight_decay=0.0,
                bf16=dtype == "bfloat16",
                use_cpu=True,
                report_to="none",
            ),
            train_dataset=datasets.Dataset.from_list([{"messages": turns}] * BATCH),
            processing_class=transformers.AutoTokenizer.from_pretrained(tokenizer),
        )
        trainer.generation_config.eos_token_id = None
        prompts = torch.randint(3, VOCABULARY, (BATCH, PROMPT))
        optimizer = trainer.create_optimizer()
        model, optimizer = trainer.accelerator.prepare(trainer.model, optimizer)
        trainer.model_wrapped = model
        widths: list[int] = []
        compute_loss = trainer.compute_loss

        def watched(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            widths.append(inputs["input_ids"].shape[1])
            return compute_loss(model, inputs, *rest, **more)

        trainer.compute_loss = watched  # pyright: ignore[reportAttributeAccessIssue]

        def step() -> None:
            ids = torch.cat([prompts, prompts[:, :ANSWER]], dim=1)
            inputs = {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            model.train()
            trainer.training_step(model, inputs, torch.tensor(BATCH * ANSWER))
            optimizer.step()
            model.zero_grad()

        found = peers.medians({"step_ms": step}, runs)
        assert set(widths) == {PROMPT + ANSWER}, widths
        return found


def main() -> None:
    """Prints one row for each dtype, other implementation and phase."""
    parser = argparse.ArgumentParser(description="Times a step of GKD with decoder-only models.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=10, help="of each phase in a process")
    parser.add_argument("--child", choices=["torch", "trl"], help="that alone, one line of JSON")
    options = parser.parse_args()
    if options.child:
        step = torch_step if options.child == "torch" else trl_step
        print(json.dumps(step(options.dtypes[0], options.runs)))
        return
    print("| dtype | phase | gkd_jax ms | other | its ms | ratio | ratios of the rounds |")
    print("|---|---|---|---|---|---|---|")
    for dtype in options.dtypes:
        rounds: list[dict[str, dict[str, float]]] = []
        for _ in range(options.rounds):
            found = {"gkd_jax": peers.ours(4, dtype, options.runs)}
            for other in ("torch", "trl"):
                command = [sys.executable, __file__, f"--child={other}", f"--runs={options.runs}"]
                found[other] = peers.last_json([*command, "--dtypes", dtype])
            rounds.append(found)
        for other, phases in (("torch", PHASES), ("trl", ("step_ms",))):
            for phase in phases:
                mine, theirs = (
                    statistics.median(found[name][phase] for found in rounds)
                    for name in ("gkd_jax", other)
                )
                ratios = [found["gkd_jax"][phase] / found[other][phase] for found in rounds]
                print(
                    f"| {dtype} | {phase[:-3]} | {mine:.0f} | {other} | {theirs:.0f} | "
                    f"{mine / theirs:.2f} | {min(ratios):.2f} to {max(ratios):.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
