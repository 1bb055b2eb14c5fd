import pickle

import numpy as np
import pytest
import seqio
import tensorflow as tf

from gkd_jax.tasks import multi30k
from gkd_jax.text import vocabularies
from gkd_jax.text.word_vocabulary import WordVocabulary


TEXT = "Ada has 7 eggs. Ada doubles the number of eggs. How many eggs are there now?"


@pytest.fixture
def t5_file(shared):
    return str(shared / "data" / "t5_vocab" / "spiece.model")


def test_t5_file_has_the_published_size_and_special_ids(t5_file):
    vocabulary = vocabularies.load(t5_file, extra_ids=100)
    assert vocabulary.vocab_size == 32_100
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert vocabulary.decode(vocabulary.encode("The answer is 18.")) == "The answer is 18."


def test_hash_is_of_the_content_not_of_the_path_or_size(t5_file, tmp_path):
    copy = tmp_path / "copy.model"
    with open(t5_file, "rb") as file:
        copy.write_bytes(file.read())
    original = vocabularies.content_hash(vocabularies.load(t5_file))
    assert original == vocabularies.content_hash(vocabularies.load(str(copy)))
    assert original != vocabularies.content_hash(vocabularies.load(t5_file, extra_ids=100))
    words = [WordVocabulary(order) for order in (["a", "b"], ["b", "a"], ["ab", ""])]
    assert len({vocabularies.content_hash(vocabulary) for vocabulary in words}) == 3


def test_pieces_of_bytes_follow_the_ids(t5_file):
    vocabulary = vocabularies.load("bytes", extra_ids=3)
    names = vocabularies.pieces(vocabulary)
    assert len(names) == vocabulary.vocab_size == 262
    assert names[vocabulary.encode("A")[0]] == "<0x41>"


@pytest.mark.parametrize("spec", ["bytes", "arithmetic"])
def test_text_survives_encoding_in_python_and_in_tensorflow(spec):
    vocabulary = vocabularies.load(spec)
    ids = list(vocabulary.encode(TEXT))
    assert vocabulary.decode(ids) == TEXT
    assert 2 not in ids
    tensor = vocabulary.encode_tf(tf.constant(TEXT))
    assert tensor.dtype == tf.int32
    assert tensor.numpy().tolist() == ids
    assert vocabulary.decode_tf(tensor).numpy().decode() == TEXT


def test_words_stop_at_eos_and_skip_padding_and_mark_the_unknown():
    vocabulary = WordVocabulary(["a", ".", "7"])
    assert vocabulary.encode("a 7 b.") == [3, 5, 2, 4]
    assert vocabulary.decode([3, 5, 4, 1, 5, 0]) == "a 7."
    assert vocabulary.decode([3, 99]) == "a <unk>"
    rows = tf.constant([[3, 5, 4, 1, 5], [5, 4, 0, 0, 0]])
    assert vocabulary.decode_tf(rows).numpy().tolist() == [b"a 7.", b"7."]
    with pytest.raises(ValueError, match=r"\['a'\] more than once"):
        WordVocabulary(["a", "b", "a"])


def test_words_work_inside_tf_data_and_after_pickling():
    vocabulary = vocabularies.arithmetic()
    dataset = tf.data.Dataset.from_tensor_slices([TEXT, ""]).map(vocabulary.encode_tf)
    first, empty = (list(ids) for ids in dataset.as_numpy_iterator())
    assert first == vocabulary.encode(TEXT)
    assert empty == []
    again = pickle.loads(pickle.dumps(vocabulary))
    assert again == vocabulary
    assert hash(again) == hash(vocabulary)
    np.testing.assert_array_equal(again.encode_tf(tf.constant(TEXT)), first)


def test_missing_files_are_named_up_front(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.model"):
        vocabularies.load(str(tmp_path / "absent.model"))
    with pytest.raises(FileNotFoundError, match="there is no tokenizer in"):
        vocabularies.load(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"'byte'.*'bytes'"):
        vocabularies.load("byte")


def test_remote_files_are_left_untouched_when_asked(monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} was touched")

    monkeypatch.setattr(tf.io.gfile, "exists", refuse)
    vocabulary = vocabularies.load("t5", check_remote=False)
    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
    assert vocabulary.extra_ids == 100
    assert vocabulary.sentencepiece_model_file.startswith("gs://t5-data/")


def test_unreachable_remote_files_are_one_clear_error(monkeypatch):
    def fail(path):
        raise tf.errors.UnavailableError(None, None, "no route to host")

    monkeypatch.setattr(tf.io.gfile, "exists", fail)
    with pytest.raises(FileNotFoundError, match=r"gs://t5-data.*no route to host"):
        vocabularies.load("t5")


@pytest.mark.parametrize(("spec", "extra_ids"), [("arithmetic", 5), ("t5", 7), ("bytes", -1)])
def test_extra_ids_that_do_not_fit_are_refused(spec, extra_ids):
    with pytest.raises(ValueError, match=f"extra_ids.*{extra_ids}"):
        vocabularies.load(spec, extra_ids=extra_ids, check_remote=False)


def test_unknown_kinds_have_no_hash():
    with pytest.raises(ValueError, match="PassThroughVocabulary"):
        vocabularies.content_hash(seqio.PassThroughVocabulary(5))


def test_trained_sentencepiece_is_deterministic_and_has_t5_ids(tmp_path):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(200)]
    texts = [" ".join(rng.choice(words, 8)) for _ in range(400)]
    first, second = tmp_path / "made" / "a.model", tmp_path / "b.model"
    for path in (first, second):
        multi30k.train_sentencepiece(iter(texts), path, vocab_size=120)
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["a.model"]
    vocabulary = vocabularies.load(str(first))
    assert vocabulary.vocab_size == 120
    assert vocabularies.pieces(vocabulary)[:3] == ["<pad>", "</s>", "<unk>"]
    assert vocabulary.tokenizer.bos_id() == -1
    assert all(vocabulary.decode(vocabulary.encode(text)) == text for text in texts[:20])


def test_impossible_sentencepiece_sizes_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 5000"):
        multi30k.train_sentencepiece(["a b c"], tmp_path / "a.model", vocab_size=5000)
    with pytest.raises(ValueError, match="got none"):
        multi30k.train_sentencepiece([], tmp_path / "a.model", vocab_size=50)
    with pytest.raises(ValueError, match=r"must be local.*gs://bucket"):
        multi30k.train_sentencepiece(["a b c"], "gs://bucket/a.model", vocab_size=8)
    assert not list(tmp_path.iterdir())
