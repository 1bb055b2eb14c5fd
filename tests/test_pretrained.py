"""Models on disk and their vocabularies: the special ids must agree."""

import io

import jax
import pytest
import sentencepiece
import seqio
from small_runs import write_decoder, write_teacher
import small_tokenizers

import gkd_jax
from gkd_jax.models import lm, t5
from gkd_jax.storage import conversion, saved_model, vocabulary_checks
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.text import vocabularies


CONFIG = t5.t5_1_1("32x2", vocab_size=128)
KEY = jax.random.key(0)


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


def test_num_pieces_compares_what_the_ids_mean(tmp_path):
    """The divergence of two models whose ids mean different tokens would be a wrong number."""
    tokenizer = small_tokenizers.train("qwen")
    count = tokenizer.get_vocab_size()
    for name, rows, written in (
        ("student", count + 3, tokenizer),
        ("teacher", count + 8, tokenizer),
        ("stranger", 900, small_tokenizers.train("qwen", vocab_size=500)),
    ):
        write_decoder(tmp_path / name, written, rows, seed=0)
    student, teacher, stranger = (tmp_path / name for name in ("student", "teacher", "stranger"))
    assert gkd_jax.num_pieces(student, teacher) == count
    with pytest.raises(ValueError, match=r"different tokenizers.*SeqKD"):
        gkd_jax.num_pieces(student, stranger)

    # A conversion keeps the tokenizer, and with it what the ids mean.
    for name in ("teacher", "stranger"):
        conversion.convert_checkpoint(str(tmp_path / name), str(tmp_path / f"own_{name}"), to="gkd")
    assert gkd_jax.num_pieces(student, tmp_path / "own_teacher") == count
    assert gkd_jax.num_pieces(tmp_path / "own_teacher") == count
    vocabulary, teachers = vocabularies.find_in_folder(student), {}
    for name in ("teacher", "stranger"):
        teachers[name] = {name: ModelConfig(checkpoint=str(tmp_path / f"own_{name}"))}
    assert vocabulary_checks.shared_pieces(vocabulary, teachers["teacher"]) == count
    with pytest.raises(ValueError, match=r"different tokenizers.*SeqKD"):
        gkd_jax.num_pieces(student, tmp_path / "own_stranger")
    with pytest.raises(ValueError, match=r"different tokenizers.*SeqKD"):
        vocabulary_checks.shared_pieces(vocabulary, teachers["stranger"])

    ours, copy, other = write_teacher(tmp_path / "ours"), tmp_path / "copy", tmp_path / "other"
    content = vocabularies.content_hash(vocabularies.arithmetic())
    for folder, found in ((copy, content), (other, "1" * 64)):
        saved_model.write_params(str(folder), CONFIG, lm.init(CONFIG, KEY), found, 100)
    assert gkd_jax.num_pieces(ours, copy) == 100
    for one in (other, student):
        with pytest.raises(ValueError, match="different vocabularies"):
            gkd_jax.num_pieces(ours, one)
    # A checkpoint that says nothing of its vocabulary is compared by the rows of its embedding.
    saved_model.write_params(str(tmp_path / "silent"), CONFIG, lm.init(CONFIG, KEY), "")
    assert gkd_jax.num_pieces(tmp_path / "silent", copy, ours) == 100
