"""Times one on-policy step of GKD with decoder-only models: gkd_jax, transformers and TRL.

    pip install trl==1.16.0
    python tests/benchmarks/decoder_peers.py [--dtypes float32 bfloat16] [--rounds 3] [--runs 10]
    python tests/benchmarks/decoder_peers.py --configs gpu2 --dtypes bfloat16    # on a GPU

The models are those of gin/bench/config4.gin or gpu2.gin, with random weights; no answer ends
early. Each measurement is a process of its own. The implementations take turns, `--rounds` times
each. Printed are the medians over rounds, and the smallest and largest ratio of gkd_jax to the
other in a round.

`torch` is the step that one would write with transformers: `generate` with its cache, logits of the
answers alone (`logits_to_keep`), the generalized JSD and AdamW. `trl` is `GKDTrainer`'s own
`training_step` with lambda 1 and beta 0.5, gradient checkpointing off, then AdamW. In bfloat16
both run under autocast with float32 parameters; on a GPU `torch` has a teacher in bfloat16, and
samples from a bfloat16 copy of the student. There `trl` is left out.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
from typing import Any

import peers


ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
    """What gin/bench/config4.gin or gpu2.gin says.

    The sizes of a model: hidden size, layers, heads, key heads, width of the MLP, head dim, and
    whether the output head is the embedding.
    """

    vocab_size: int
    prompt: int
    answer: int
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    batch: int = 16


CONFIGS = {
    "config4": Config(32_128, 64, 32, (256, 4, 4, 2, 768, 64, 1), (512, 6, 8, 4, 1536, 64, 1)),
    "gpu2": Config(
        151_936, 512, 256, (1024, 28, 16, 8, 3072, 128, 1), (4096, 36, 32, 8, 12_288, 128, 0)
    ),
}


def _model(vocab_size: int, sizes: tuple[int, ...]) -> Any:
    import transformers

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "intermediate_size", "head_dim", "tie_word_embeddings")
    fields: dict[str, Any] = dict(zip(names, sizes, strict=True))
    config = transformers.Qwen3Config(
        vocab_size=vocab_size,
        eos_token_id=None,
        **{**fields, "tie_word_embeddings": bool(fields["tie_word_embeddings"])},
    )
    made = transformers.Qwen3ForCausalLM(config)
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made


def torch_step(name: str, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of each phase with transformers; `update_ms` includes the teacher."""
    import torch
    from torch.nn.functional import log_softmax

    config, device, low = CONFIGS[name], peers.torch_device(), dtype == "bfloat16"
    torch.manual_seed(0)
    with torch.device(device):
        student = _model(config.vocab_size, config.student)
        if low and device == "cuda":
            torch.set_default_dtype(torch.bfloat16)  # the teacher's float32 weights are 33 GB
        teacher = _model(config.vocab_size, config.teacher).eval()
        torch.set_default_dtype(torch.float32)
        prompts = torch.randint(3, config.vocab_size, (config.batch, config.prompt))
    sampler = peers.in_bfloat16(student, device) if low else student
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.0)
    autocast = torch.autocast(device, torch.bfloat16, enabled=low)

    def sample() -> Any:
        with torch.no_grad(), autocast if sampler is student else contextlib.nullcontext():
            if sampler is not student:
                sampler.load_state_dict(student.state_dict())
            return sampler.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=config.answer,
            )

    def logits(model: Any, ids: Any) -> Any:
        with autocast:
            found = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=config.answer + 1
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
    assert drawn.shape == (config.batch, config.prompt + config.answer), drawn.shape
    phases: dict[str, Callable[[], Any]] = {
        "sample_ms": sample,
        "score_ms": lambda: score(drawn),
        "update_ms": lambda: update(drawn),
        "step_ms": lambda: update(sample()),
    }
    return peers.medians(phases, runs)


def trl_step(name: str, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of a whole step of TRL's GKDTrainer."""
    import datasets
    import torch
    import transformers
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    sys.path.insert(0, str(ROOT / "tests"))
    import small_tokenizers

    config = CONFIGS[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = small_tokenizers.write(pathlib.Path(folder) / "tokenizer", "qwen")
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        trainer = GKDTrainer(
            model=_model(config.vocab_size, config.student),
            teacher_model=_model(config.vocab_size, config.teacher),
            args=GKDConfig(
                output_dir=folder,
                lmbda=1.0,
                beta=0.5,
                temperature=1.0,
                max_new_tokens=config.answer,
                per_device_train_batch_size=config.batch,
                gradient_checkpointing=False,
                learning_rate=3e-4,
                weight_decay=0.0,
                bf16=dtype == "bfloat16",
                use_cpu=True,
                report_to="none",
            ),
            train_dataset=datasets.Dataset.from_list([{"messages": turns}] * config.batch),
            processing_class=transformers.AutoTokenizer.from_pretrained(tokenizer),
        )
        trainer.generation_config.eos_token_id = None
        prompts = torch.randint(3, config.vocab_size, (config.batch, config.prompt))
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
            ids = torch.cat([prompts, prompts[:, : config.answer]], dim=1)
            inputs = {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            model.train()
            trainer.training_step(model, inputs, torch.tensor(config.batch * config.answer))
            optimizer.step()
            model.zero_grad()

        found = peers.medians({"step_ms": step}, runs)
        assert set(widths) == {config.prompt + config.answer}, widths
        return found


def main() -> None:
    """Times this script's configurations."""
    options = peers.parse(list(CONFIGS), ["torch", "trl"])
    if options.child:
        step = torch_step if options.child == "torch" else trl_step
        print(json.dumps(step(options.configs[0], options.dtypes[0], options.runs)))
        return
    others = {"torch": (sys.executable, peers.PHASES), "trl": (sys.executable, ("step_ms",))}
    if peers.torch_device() == "cuda":
        del others["trl"]
    peers.compare(options, peers.ours, others, __file__)


if __name__ == "__main__":
    main()
