"""Tokenizers of Hugging Face folders give the ids, texts and rendered chats of transformers."""

import copy
import datetime
import json
import pickle
import random

import pytest
import seqio
import small_tokenizers
import tensorflow as tf
from tokenizers import processors
import transformers

from gkd_jax.text import files, vocabularies
from gkd_jax.text.chat_template import ChatTemplate
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary


REAL = ("qwen3", "llama3_1", "gemma3")
# Scripts, marks, emoji, spaces, control characters, ligatures, and what templates are made of.
RANGES = [(32, 126), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x4FF), (0x5D0, 0x5EA), (0x600, 0x6FF)]
RANGES += [(0x900, 0x97F), (0xE00, 0xE7F), (0x2000, 0x206F), (0x3040, 0x30FF), (0x4E00, 0x4FFF)]
RANGES += [(0xAC00, 0xACFF), (0xFB00, 0xFB06), (0x1F300, 0x1F6FF), (9, 13), (0xE000, 0xE010)]
PHRASES = ["<|im_start|>", "<|eot_id|>", "<bos>", "<think>", "The answer", "\n\n", "  ", "12,345"]


def unicode_lines(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)

    def word() -> str:
        if draw.random() < 0.1:
            return draw.choice(PHRASES)
        low, high = draw.choice(RANGES)
        return "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 8)))

    joins = ["", " ", "  ", "\n", "\t"]
    return [
        draw.choice(joins).join(word() for _ in range(draw.randint(0, 8))) for _ in range(count)
    ]


def chats(count: int, *, system: bool = True, seed: int = 0) -> list[dict]:
    """Alternating turns with `add_generation_prompt` and, in some chats, `tools`."""
    draw = random.Random(seed)
    texts = [line or "x" for line in unicode_lines(400, seed)]
    tool = {
        "type": "function",
        "function": {"name": "größe", "parameters": {"a": [1, None, "<b>"]}},
    }
    found = []
    for index in range(count):
        messages = (
            [{"role": "system", "content": draw.choice(texts)}] if system and index % 3 else []
        )
        for turn in range(draw.randint(1, 5)):
            role = "assistant" if turn % 2 else "user"
            text = draw.choice(texts)
            if role == "assistant" and draw.random() < 0.3:
                text = f"<think>\n{draw.choice(texts)}\n</think>\n\n{text}"
            messages.append({"role": role, "content": text, "name": None})
        chat = {"messages": messages, "add_generation_prompt": bool(draw.randint(0, 1))}
        found.append({**chat, "tools": [tool]} if index % 4 == 0 else chat)
    return found


@pytest.fixture(params=small_tokenizers.KINDS)
def kind(request):
    return request.param


def assert_equals_transformers(folder, lines, conversations):
    ours, theirs = TokenizerVocabulary(folder), transformers.AutoTokenizer.from_pretrained(folder)
    bare = theirs(lines, add_special_tokens=False)["input_ids"]
    assert [ours.encode(line) for line in lines] == bare
    whole = theirs(lines)["input_ids"]
    twice = [(ours.bos_id is not None and ids[:1] == [ours.bos_id]) for ids in bare]
    assert [ours.encode_prompt(line) for line in lines] == [
        ids[1:] if double else ids for ids, double in zip(whole, twice, strict=True)
    ]
    skipped = theirs.batch_decode(bare, skip_special_tokens=True)
    stops = [any(end in ids for end in ours.eos_ids) for ids in bare]
    assert [ours.decode(ids) for ids, stop in zip(bare, stops, strict=True) if not stop] == [
        text for text, stop in zip(skipped, stops, strict=True) if not stop
    ]
    assert ours.chat_template is not None
    for chat in conversations:
        expected = theirs.apply_chat_template(
            chat["messages"],
            tools=chat.get("tools"),
            tokenize=False,
            add_generation_prompt=chat["add_generation_prompt"],
        )
        assert ours.chat_template.render(**chat) == expected
        ids = theirs(expected, add_special_tokens=False)["input_ids"]
        assert ours.encode(expected) == ids
        assert ours.encode_prompt(expected) == ids
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(theirs, f"{name}_token_id")) is not None:
            assert getattr(ours, f"{name}_id") == index
    assert ours.vocab_size == len(theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_equal_transformers(shared, name):
    folder = shared / "tokenizers" / name
    assert_equals_transformers(folder, unicode_lines(10_000), chats(50, system=name != "gemma3"))


def test_small_tokenizers_equal_transformers(folders, kind):
    assert_equals_transformers(folders[kind], unicode_lines(300), chats(20, system=kind != "gemma"))


def test_files_that_transformers_saves_again_have_the_same_content(folders, kind, tmp_path):
    original = TokenizerVocabulary(folders[kind])
    transformers.AutoTokenizer.from_pretrained(folders[kind]).save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    again = TokenizerVocabulary(tmp_path)
    assert again.content_hash == original.content_hash
    assert again.chat_template is not None
    assert again.chat_template.templates == {"default": small_tokenizers.TEMPLATES[kind]}
    assert again.chat_template.source.endswith("chat_template.jinja")


def test_end_ids_are_those_of_generation_and_the_tokenizer(folders, kind, tmp_path):
    vocabulary = TokenizerVocabulary(folders[kind])
    tokens = [vocabulary.pieces[index] for index in vocabulary.eos_ids]
    assert tokens[0] == small_tokenizers.NAMES[kind]["eos_token"]
    assert set(tokens) == set(small_tokenizers.STOPS[kind])
    assert vocabularies.end_ids(vocabulary) == vocabulary.eos_ids
    for index in vocabulary.eos_ids:
        ids = [*vocabulary.encode("12 eggs"), index, *vocabulary.encode("more")]
        assert vocabulary.decode(ids) == "12 eggs"
    # Without generation_config.json the model's own configuration says it, also inside a composite.
    small_tokenizers.write(tmp_path, kind)
    (tmp_path / "generation_config.json").unlink()
    config = {"text_config": {"eos_token_id": [5, 9], "pad_token_id": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = TokenizerVocabulary(tmp_path)
    assert other.eos_ids == (vocabulary.eos_id, 5, 9)
    assert other.pad_id == (3 if kind == "llama" else vocabulary.pad_id)


@pytest.mark.parametrize("ids", ["5", [5, "9"], -1, True, [5.0]])
def test_an_end_id_that_is_no_id_is_named(ids, tmp_path):
    small_tokenizers.write(tmp_path, "qwen")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match=r"generation_config.json.*eos_token_id.*got"):
        TokenizerVocabulary(tmp_path)


def test_id_zero_and_unknown_ids_decode_like_others(folders):
    vocabulary = TokenizerVocabulary(folders["qwen"])
    assert vocabulary.pieces[0] == "!"
    assert vocabulary.decode([0, 0, vocabulary.vocab_size + 7, 0]) == "!!!"
    assert vocabulary.piece(vocabulary.vocab_size + 7) == f"<{vocabulary.vocab_size + 7}>"
    assert [vocabulary.piece(i) for i in vocabulary.encode("the eggs")] == ["the", "▁eggs"]
    # A part of a character is shown as it is stored.
    assert all("\ufffd" not in vocabulary.piece(i) for i in vocabulary.encode("☃"))


def test_padding_and_truncation_that_a_file_was_saved_with_are_off(tmp_path):
    tokenizer = small_tokenizers.train("qwen")
    tokenizer.enable_padding(length=50, pad_id=3, pad_token="$")
    tokenizer.enable_truncation(2)
    folder = small_tokenizers.write(tmp_path / "x", "qwen", tokenizer)
    plain = TokenizerVocabulary(small_tokenizers.write(tmp_path / "y", "qwen"))
    text = "the lazy dog has 12 eggs"
    assert TokenizerVocabulary(folder).encode(text) == plain.encode(text)


@pytest.mark.parametrize("end", ["", " <|eot|>"])
def test_what_is_put_around_a_text_is_the_tokenizer_s_alone(tmp_path, end):
    tokenizer = small_tokenizers.train("llama")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|begin|> $A{end}",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<|begin|>", "<|eot|>")],
    )
    folder = small_tokenizers.write(tmp_path, "llama", tokenizer)
    path = folder / "tokenizer_config.json"
    # Both keys are those of older versions; transformers 5 reads the file.
    config = json.loads(path.read_text()) | {"add_bos_token": False, "add_eos_token": not end}
    path.write_text(json.dumps(config))
    ours, theirs = TokenizerVocabulary(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("7 eggs", ""):
        expected = theirs(text)["input_ids"]
        assert ours.encode_prompt(text) == expected
        assert ours.for_prompts().encode(text) == (expected[:-1] if end else expected)
    assert ours.ends_prompts == bool(end)


def test_tokens_of_the_configuration_are_added(tmp_path):
    folder = small_tokenizers.write(tmp_path, "qwen")
    path = folder / "tokenizer_config.json"
    size = TokenizerVocabulary(folder).vocab_size
    token = {"content": "<tool>", "special": False, "normalized": False}
    config = {**json.loads(path.read_text()), "unk_token": "<new>"}
    config["added_tokens_decoder"] = {str(size): token}
    path.write_text(json.dumps(config))
    ours, theirs = TokenizerVocabulary(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.pieces[-2:] == ("<tool>", "<new>")
    assert ours.encode("a<tool><new>") == theirs("a<tool><new>")["input_ids"]
    ids = [size, size + 1]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "<tool>"


@pytest.mark.parametrize("splits", [True, False])
def test_names_of_special_tokens_are_split_if_the_configuration_says_so(splits, tmp_path):
    folder = small_tokenizers.write(tmp_path, "qwen")
    before = TokenizerVocabulary(folder).content_hash
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "split_special_tokens": splits}
    path.write_text(json.dumps(config))
    ours, theirs = TokenizerVocabulary(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = "a<|im_end|>b <think>c"
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode_prompt(text) == theirs(text)["input_ids"]
    assert (ours.eos_id in ours.encode(text)) == (not splits)
    assert (ours.content_hash == before) == (not splits)  # a run of the other ids is another run


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_tokens_that_the_configuration_lists_are_special(key, tmp_path):
    """And it changes the properties of a token that `tokenizer.json` has."""
    folder = small_tokenizers.write(tmp_path, "qwen")
    path = folder / "tokenizer_config.json"
    think = TokenizerVocabulary(folder).pieces.index("<think>")
    token = {"content": "<think>", "lstrip": True, "special": False, "normalized": False}
    config = {**json.loads(path.read_text()), key: ["<|im_end|>", "<tool>", "<call>"]}
    path.write_text(json.dumps({**config, "added_tokens_decoder": {str(think): token}}))
    ours, theirs = TokenizerVocabulary(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.pieces[-2:] == ("<tool>", "<call>")
    assert ours.vocab_size == len(theirs)
    ids = theirs("a <tool> <call><think> b  <think>")["input_ids"]
    assert ours.encode("a <tool> <call><think> b  <think>") == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_tensorflow_does_the_same_and_its_stream_can_be_saved(folders, kind, tmp_path):
    vocabulary = TokenizerVocabulary(folders[kind])
    texts = ["the eggs", "naïve 東京", ""] * 3
    assert [vocabulary.encode_tf(tf.constant(text)).numpy().tolist() for text in texts] == [
        vocabulary.encode(text) for text in texts
    ]
    ids = vocabulary.encode("the eggs")
    assert vocabulary.decode_tf(tf.constant(ids)).numpy() == b"the eggs"
    assert vocabulary.decode_tf(tf.constant([ids, ids])).numpy().tolist() == [b"the eggs"] * 2
    dataset = tf.data.Dataset.from_tensor_slices(texts).map(vocabulary.encode_tf)
    original = iter(dataset)
    next(original)
    path = tf.train.Checkpoint(iterator=original).write(str(tmp_path / "stream"))
    resumed = iter(dataset)
    tf.train.Checkpoint(iterator=resumed).read(path).assert_consumed()
    assert next(resumed).numpy().tolist() == vocabulary.encode(texts[1])


def test_copies_are_equal_and_views_for_prompts_differ(folders):
    vocabulary = TokenizerVocabulary(folders["llama"])
    prompts = vocabulary.for_prompts()
    for one in (vocabulary, prompts):
        for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert other == one
            assert hash(other) == hash(one)
            assert other.encode("7 eggs") == one.encode("7 eggs")
    assert prompts != vocabulary
    assert prompts.encode("7 eggs") == [vocabulary.bos_id, *vocabulary.encode("7 eggs")]
    assert vocabularies.content_hash(prompts) == vocabularies.content_hash(vocabulary)


# Folders ------------------------------------------------------------------------------------------


def test_a_folder_is_a_vocabulary_by_name(folders, tmp_path):
    folder = folders["qwen"]
    for spec in (str(folder), str(folder / "tokenizer.json")):
        vocabulary = vocabularies.load(spec)
        assert isinstance(vocabulary, TokenizerVocabulary)
        assert vocabularies.num_pieces(vocabulary) == vocabulary.vocab_size
    assert vocabularies.find_in_folder(folder)
    assert not vocabularies.find_in_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*expected tokenizer\.json or"):
        vocabularies.of_folder(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(FileNotFoundError, match=r"it has tokenizer\.model, which .*transformers"):
        vocabularies.load(str(tmp_path))
    with pytest.raises(ValueError, match="has its own extra ids, got 3"):
        vocabularies.load(str(folder), extra_ids=3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json: expected a tokenizer of the library"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "line 1: .*LFS pointer"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object"),
        ("tokenizer_config.json", '{\n"a" 1}', r"tokenizer_config\.json, line 2: not JSON"),
        ("generation_config.json", "\xff", r"generation_config\.json, line 1: expected UTF-8"),
        ("chat_template.jinja", "\xff", r"chat_template\.jinja, line 1: expected UTF-8"),
        ("tokenizer_config.json", '{"chat_template": ["x"]}', "'name' and 'template'"),
    ],
)
def test_damaged_files_of_a_folder_are_named(tmp_path, name, content, message):
    folder = small_tokenizers.write(tmp_path, "qwen")
    (folder / name).write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        vocabularies.of_folder(folder)


def test_t5_folders_have_their_sentinels_and_one_content_in_both_forms(shared, tmp_path):
    source = shared / "data" / "t5_vocab" / "spiece.model"
    (tmp_path / "spiece.model").write_bytes(source.read_bytes())
    plain = vocabularies.load(str(source))
    assert vocabularies.of_folder(tmp_path).extra_ids == 0
    (tmp_path / "config.json").write_text('{"model_type": "t5", "vocab_size": 32128}')
    assert vocabularies.of_folder(tmp_path).extra_ids == 100
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 100}')
    vocabulary = vocabularies.load(str(tmp_path))
    assert vocabulary.vocab_size == plain.vocab_size + 100
    # What transformers 5 saves: no spiece.model, the same pieces.
    saved = tmp_path / "saved"
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(saved)
    fast = vocabularies.of_folder(saved)
    assert isinstance(fast, TokenizerVocabulary)
    assert vocabularies.content_hash(fast) == vocabularies.content_hash(vocabulary)
    names = {"student_name": "a", "teacher_name": "b"}
    assert vocabularies.shared_pieces(fast, vocabulary, **names) == 32_100
    assert vocabularies.shared_pieces(fast, plain, **names) == 32_000
    text = "The answer is 12, or is it?"
    assert fast.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert fast.encode_prompt(text) == theirs(text)["input_ids"]
    assert fast.ends_prompts
    assert fast.decode([*fast.encode(text), fast.eos_id, 5]) == text


def test_a_byt5_folder_has_bytes(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert vocabularies.load(str(tmp_path)) == seqio.ByteVocabulary(extra_ids=125)
    assert vocabularies.find_in_folder(tmp_path)


# Two models ---------------------------------------------------------------------------------------


def changed(tmp_path, change) -> TokenizerVocabulary:
    """The Qwen-like folder with another tokenizer.json."""
    folder = small_tokenizers.write(tmp_path / "changed", "qwen")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return TokenizerVocabulary(folder)


def swap_tokens(content):
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def reverse_merges(content):
    content["model"]["merges"].reverse()


def drop_normalizer(content):
    content["normalizer"] = None


def other_split(content):
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}
    content["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Digits", "individual_digits": True}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_tokens, "id 64 is 'a' to the one and 'b' to the other"),
        (reverse_merges, "merges, normalizer or pre-tokenizer"),
        (drop_normalizer, "merges, normalizer or pre-tokenizer"),
        (other_split, "merges, normalizer or pre-tokenizer"),
    ],
)
def test_different_tokenizers_are_refused_with_the_way_that_works(
    folders, tmp_path, change, message
):
    student, teacher = TokenizerVocabulary(folders["qwen"]), changed(tmp_path, change)
    with pytest.raises(
        ValueError, match=f"'S'.*'T' have different.*{message}.*SeqKD works"
    ) as error:
        vocabularies.shared_pieces(student, teacher, student_name="S", teacher_name="T")
    assert "\n" not in str(error.value)


def test_tokenizers_of_other_families_are_refused(folders):
    vocabulary = {kind: TokenizerVocabulary(path) for kind, path in folders.items()}
    for one, other in (("qwen", "llama"), ("gemma", "qwen")):
        with pytest.raises(ValueError, match=r"different tokenizers: id .*SeqKD"):
            vocabularies.shared_pieces(
                vocabulary[one], vocabulary[other], student_name="S", teacher_name="T"
            )
    with pytest.raises(ValueError, match="SeqKD"):
        vocabularies.shared_pieces(
            vocabulary["qwen"], vocabularies.arithmetic(), student_name="S", teacher_name="T"
        )


def test_further_tokens_at_the_end_leave_the_shared_ones(folders, tmp_path):
    student = TokenizerVocabulary(folders["qwen"])

    def add(content):
        last = max(token["id"] for token in content["added_tokens"])
        token = {**content["added_tokens"][-1], "id": last + 1, "content": "<tool>"}
        content["added_tokens"].append(token)

    teacher = changed(tmp_path, add)
    assert teacher.vocab_size == student.vocab_size + 1
    for one, other in ((student, teacher), (teacher, student), (student, student)):
        shared = vocabularies.shared_pieces(one, other, student_name="S", teacher_name="T")
        assert shared == student.vocab_size


# Templates ----------------------------------------------------------------------------------------


def render(template: str, messages=None, **settings) -> str:
    made = ChatTemplate({"default": template}, {"bos_token": "<s>"}, "file")
    return made.render(messages or [{"role": "user", "content": "<b> & 'ü'"}], **settings)


TEMPLATES = [
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "a{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}b{{ x }}",
    "{%- for m in messages %}\n  {% if true %}\n    x\n  {% endif %}\n{% endfor %}",
    "{{ bos_token }}{{ eos_token is defined }}{{ tools is none }}{{ documents is none }}",
    "{% set ns = namespace(found=false) %}{% set ns.found = true %}{{ ns.found }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}{{ 'name' in messages[0] }}",
    "{{ dict(a=1) }}{{ enable_thinking is defined }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(folders, template):
    theirs = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    theirs.bos_token = "<s>"
    messages = [
        {"role": "user", "content": "<b> & 'ü'", "reasoning": "why", "name": None},
        {"role": "assistant", "content": "ja"},
    ]
    tokens = {"bos_token": "<s>", "eos_token": theirs.eos_token}
    ours = ChatTemplate({"default": template}, tokens, "file")
    assert ours.render(messages) == theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False
    )


def test_templates_by_name(tmp_path):
    folder = small_tokenizers.write(tmp_path, "qwen")
    path = folder / "tokenizer_config.json"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    messages = [{"role": "user", "content": "x"}]

    def rendered() -> list[str]:
        template = TokenizerVocabulary(folder).chat_template
        assert template is not None
        return [template.render(messages), template.render(messages, tools=[{"a": 1}])]

    assert rendered() == ["plain", "tools"]
    (folder / "chat_template.jinja").write_text("of the file")
    assert rendered() == ["of the file"] * 2
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools of a file")
    assert rendered() == ["of the file", "tools of a file"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses these messages: TypeError"),
        ("{{ nothing.at_all }}", "refuses these messages: UndefinedError"),
        ("{{ messages.append(1) }}", "refuses these messages: SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: SecurityError"),
        ("{{ namespace(_x=1) }}", "refuses these messages: SecurityError"),
        ("{{ 1 / 0 }}", "refuses these messages: ZeroDivisionError"),
        ("a\n{% if %}", "the chat template of 'file' is no Jinja: line 2"),
    ],
)
def test_templates_that_raise_are_one_error(template, message):
    with pytest.raises(ValueError, match=message):
        render(template)


def test_no_messages_and_no_default_template():
    template = ChatTemplate({"rag": "x"}, {}, "file")
    with pytest.raises(ValueError, match="at least one message, got none"):
        template.render([])
    with pytest.raises(
        ValueError, match=r"'file' has no chat template named 'default', got \['rag'\]"
    ):
        template.render([{"role": "user", "content": "x"}])


def test_the_date_of_a_template_can_be_fixed():
    now = datetime.datetime(2024, 7, 26)
    assert render("{{ strftime_now('%d %b %Y') }}", now=now) == "26 Jul 2024"


def test_folders_without_files_beside_the_tokenizer(tmp_path):
    folder = small_tokenizers.write(tmp_path, "qwen")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    vocabulary = TokenizerVocabulary(folder)
    assert (vocabulary.eos_ids, vocabulary.eos_id, vocabulary.bos_id) == ((), None, None)
    assert vocabulary.chat_template is None
    assert vocabulary.decode(vocabulary.encode("7 eggs")) == "7 eggs"
    assert files.read_json_in(str(folder), "none.json") == {}
