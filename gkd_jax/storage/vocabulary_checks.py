"""Whether a model and a vocabulary belong together."""

import seqio

from gkd_jax.models import lm
from gkd_jax.storage import checkpoints
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.text import comparison, vocabularies


def check_vocabularies(
    vocabulary: seqio.Vocabulary, chosen: dict[str, ModelConfig | None], pending: frozenset[str]
) -> int | None:
    """Compares a run's vocabulary with what its models were trained with, as far as that is known.

    Our own checkpoints know the hash of their vocabulary, Hugging Face folders hold their
    tokenizer, and T5X's checkpoints hold nothing to compare.

    Args:
        vocabulary: of the run.
        chosen: the models by the name that messages give them.
        pending: checkpoints that are not looked at.

    Returns:
        How many ids mean the same to all, where some model has fewer than another; else None.

    Raises:
        ValueError: naming the model whose vocabulary is another.
    """
    shared = None
    for name, model in chosen.items():
        if model is None or model.checkpoint is None or model.checkpoint in pending:
            continue
        step_folder = checkpoints.find_step(model.checkpoint)
        if step_folder is None:
            path = model.checkpoint
            if "://" in path or not vocabularies.has_tokenizer(path):
                continue
            found = comparison.shared_pieces(
                vocabulary,
                vocabularies.of_folder(path),
                student_name="this run's vocabulary",
                teacher_name=f"{name} {path}",
            )
            shared = found if shared is None else min(shared, found)
            continue
        found = checkpoints.read_description(step_folder)["vocabulary"]
        expected = vocabularies.content_hash(vocabulary)
        if found and found != expected:
            raise ValueError(
                f"the {name}'s checkpoint {model.checkpoint!r} was trained with another vocabulary "
                f"(content {found[:12]}) than this task's (content {expected[:12]})"
            )
    return shared


def check_special_ids(
    config: lm.Config, vocabulary: seqio.Vocabulary, *, check_remote: bool = True
) -> None:
    """A family with special ids of its own needs a vocabulary that has them too.

    A T5 masks id 0, starts a target with it and ends one with id 1. Others have none of their own.

    Args:
        config: of a model of any family.
        vocabulary: of the run.
        check_remote: False leaves remote vocabularies untouched.

    Raises:
        ValueError: naming the ids of a vocabulary that differs.
    """
    remote = "://" in getattr(vocabulary, "sentencepiece_model_file", "")
    if not config.family.EOS_IDS or (remote and not check_remote):
        return
    ends, pad, unknown = vocabularies.end_ids(vocabulary), vocabulary.pad_id, vocabulary.unk_id
    expected = config.family.EOS_IDS, config.family.BANNED_IDS[0]
    if (ends, pad) != expected or unknown == pad:
        raise ValueError(
            f"a T5 needs a vocabulary with pad {expected[1]}, end of text {expected[0][0]} and a "
            "piece that is masked nowhere for what is unknown; this one has "
            f"pad {pad}, end of text {', '.join(map(str, ends)) or 'none'} and unknown {unknown}"
        )
