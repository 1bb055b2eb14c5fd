"""Models on disk and their vocabularies: the special ids must agree."""

import io

import pytest
import sentencepiece
import seqio

from gkd_jax.models import t5
from gkd_jax.storage import vocabulary_checks
from gkd_jax.text import vocabularies


CONFIG = t5.t5_1_1("32x2", vocab_size=128)


def sentencepiece_file(path, **ids):
    model = io.BytesIO()
    words = [f"word{i} {'abcdefgh'[i % 8] * 3} number {i}" for i in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=60, minloglevel=2, **ids
    )
    path.write_bytes(model.getvalue())
    return seqio.SentencePieceVocabulary(str(path))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}, "end of text 2 and unknown 0"),
        ({"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}, "end of text 2 and unknown 3"),
        ({"unk_id": 0, "eos_id": 1, "bos_id": -1, "pad_id": -1}, "end of text 1 and unknown 0"),
    ],
)
def test_a_vocabulary_with_other_ids_than_t5_is_refused(ids, message, tmp_path):
    """Llama's, CodeT5's and vocabularies trained without a pad have such ids."""
    vocabulary = sentencepiece_file(tmp_path / "spiece.model", **ids)
    with pytest.raises(ValueError, match=f"a T5 needs a vocabulary with pad 0.*{message}"):
        vocabulary_checks.check_special_ids(CONFIG, vocabulary)


def test_the_usual_vocabularies_are_taken(tmp_path):
    usual = sentencepiece_file(tmp_path / "a.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    for vocabulary in (usual, vocabularies.load("bytes"), vocabularies.load("arithmetic")):
        vocabulary_checks.check_special_ids(CONFIG, vocabulary)
    vocabulary_checks.check_special_ids(CONFIG, vocabularies.t5_default(), check_remote=False)
