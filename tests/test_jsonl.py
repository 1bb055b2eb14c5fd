"""JSONL files of all documented forms become prompts and targets; errors name file and line."""

import gzip
import json
import pickle
import re

import numpy as np
import pytest
import seqio
import small_tokenizers
import transformers

from gkd_jax.input import data, jsonl, named_tasks, padded_batches, row_ids, rows, streams
from gkd_jax.input.split import Split
from gkd_jax.tasks import flan
from gkd_jax.text import task_names, vocabularies
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary


BYTES = seqio.ByteVocabulary()
LENGTHS = {"inputs": 64, "targets": 48}
CHAT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
    {"role": "user", "content": "and 3 more?"},
]
ANSWER = {"role": "assistant", "content": "The answer is 7."}


def write(path, objects) -> str:
    """Writes objects as JSON lines; strings are written as they are."""
    lines = [
        row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in objects
    ]
    content = "".join(line + "\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def pairs(count: int, prefix: str = "in") -> list[dict]:
    return [{"inputs": f"{prefix} {i}", "targets": f"out {i}"} for i in range(count)]


def open_task(path, **settings):
    """Opens the task as a run does."""
    settings = {"vocabulary": "bytes", "feature_lengths": LENGTHS, "batch_size": 2, **settings}
    task, _ = named_tasks.open_task(data.DataConfig(task=str(path), **settings))
    return task


def texts(task, split: str = "train", feature: str = "inputs") -> list[str]:
    dataset = task.get_dataset(LENGTHS, split=split, shuffle=False)
    return [row[f"{feature}_pretokenized"].decode() for row in dataset.as_numpy_iterator()]


@pytest.fixture(params=small_tokenizers.KINDS)
def vocabulary(request, folders):
    return TokenizerVocabulary(folders[request.param])


def example(vocabulary, row, *variables) -> row_ids.Example:
    (read,) = [rows._row(row, "x.jsonl", 1)]
    (made,) = row_ids.tokenize([read], vocabulary, "x.jsonl", *variables)
    return made


# Forms of rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "target"),
    [
        ({"inputs": "a", "targets": "b", "more": 1}, "a", "b"),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": "c", "completion": "d", "inputs": "a", "targets": "b"}, "a", "b"),
        ({"inputs": "a"}, "a", None),
        ({"prompt": "a"}, "a", None),
        ({"messages": CHAT}, CHAT, None),
        ({"messages": [*CHAT, ANSWER]}, CHAT, ANSWER),
        # As UltraChat has it: the messages are what counts.
        ({"prompt": "a", "prompt_id": "7", "messages": [*CHAT, ANSWER]}, CHAT, ANSWER),
        # As TRL has it.
        ({"prompt": CHAT, "completion": [ANSWER]}, CHAT, ANSWER),
        ({"prompt": CHAT}, CHAT, None),
        (
            {"messages": [{"role": "system", "content": "s"}]},
            [{"role": "system", "content": "s"}],
            None,
        ),
    ],
)
def test_rows_in_the_forms_that_people_have(row, prompt, target):
    read = rows._row(row, "x.jsonl", 3)
    assert (read.prompt, read.target, read.line) == (prompt, target, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "id": 1}, "expected 'inputs', 'prompt' or 'messages', got 'text', 'id'"),
        ({}, "expected 'inputs', 'prompt' or 'messages', got an empty object"),
        ({"prompt": 3}, "'prompt' must be a string, got 3"),
        ({"prompt": "a", "completion": None}, "'completion' must be a string, got null"),
        ({"prompt": CHAT, "completion": "b"}, "'completion' must be messages, as 'prompt' is"),
        ({"prompt": "a", "completion": [ANSWER]}, "'completion' must be a string, got a list"),
        ({"messages": []}, "'messages' must be a list of messages that is not empty"),
        ({"messages": "a"}, "'messages' must be a list of messages that is not empty"),
        ({"messages": ["a"]}, "message 1 must be an object with a string 'role'"),
        ({"messages": [*CHAT, {"content": "a"}]}, "message 4 must be an object .* 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 must have a string 'content'"),
        ({"messages": [{"role": "user"}]}, "message 1 must have a string 'content'"),
        # As other data name the roles. The answer would be a turn of the prompt.
        ({"messages": [{**CHAT[0], "role": "human"}]}, "message 1 .* 'user', got 'human'"),
        ({"messages": [*CHAT, {**ANSWER, "role": "gpt"}]}, "message 4 .* 'assistant', got 'gpt'"),
        (
            {"prompt": CHAT, "completion": [{**ANSWER, "role": "Assistant"}]},
            "message 4 .* got 'Assistant'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]},
            "message 1 must have parts of the type 'text', got 'image'",
        ),
        ({"messages": [ANSWER]}, "expected a turn before the assistant's, got none"),
        ({"messages": CHAT, "tools": {"a": 1}}, "'tools' must be a list of objects"),
        ({"inputs": "a", "truncated": 1}, "'truncated' must be true or false, got 1"),
        ({"prompt": "", "completion": "b"}, "expected a prompt with text, got an empty one"),
        ({"inputs": " \n", "targets": "b"}, "expected a prompt with text, got an empty one"),
        ({"prompt": "a", "targets": "b"}, "'prompt' goes with 'completion', got 'targets'"),
        ({"inputs": "a", "completion": "b"}, "'inputs' goes with 'targets', got 'completion'"),
        ({"messages": CHAT}, "'messages' need a vocabulary with a chat template .* has none"),
        ('{"prompt": "a" ', "not JSON"),
        ("", "expected a JSON object, got an empty line"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}, row])
    task = open_task(path)
    wanted = re.escape(f"{path}, line 2: ") + message
    with pytest.raises(ValueError, match=wanted) as error:
        task.get_dataset(LENGTHS, split="train", shuffle=False)
    assert "\n" not in str(error.value)


def test_a_template_that_raises_names_file_and_line(tmp_path, folders):
    twice = [{"role": "user", "content": "a"}] * 2
    path = write(tmp_path / "x.jsonl", [{"messages": CHAT}, {"messages": twice}])
    task = open_task(path, vocabulary=str(folders["gemma"]))
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: .*refuses .*roles must alternate"):
        task.get_dataset(LENGTHS, split="train", shuffle=False)


# Ids ----------------------------------------------------------------------------------------------


def test_texts_are_prompts_as_transformers_has_them_and_targets_with_an_end(vocabulary):
    made = example(vocabulary, {"prompt": "How many?", "completion": "12 eggs"})
    theirs = transformers.AutoTokenizer.from_pretrained(vocabulary.folder)
    assert made.inputs.tolist() == theirs("How many?")["input_ids"]
    answer = theirs("12 eggs", add_special_tokens=False)["input_ids"]
    assert made.targets.tolist() == [*answer, theirs.eos_token_id]
    assert (made.prompt, made.target) == ("How many?", "12 eggs")
    # Some files have the end token in the text. As in TRL, it is not added again.
    ended = example(vocabulary, {"prompt": "How many?", "completion": f"12 eggs{theirs.eos_token}"})
    assert (ended.targets.tolist(), ended.target) == (made.targets.tolist(), "12 eggs")
    # A prediction is compared with what the ids can say: Qwen composes the accent.
    accent = theirs("cafe\u0301", add_special_tokens=False)["input_ids"]
    made = example(vocabulary, {"inputs": "a", "targets": "cafe\u0301"})
    assert made.target == theirs.decode(accent, skip_special_tokens=True)


def test_texts_of_t5_s_kind_end_in_eos():
    made = example(BYTES, {"inputs": "A", "targets": "B"})
    assert (made.inputs.tolist(), made.targets.tolist()) == ([68, 1], [69, 1])
    assert example(BYTES, {"inputs": "A"}).targets.tolist() == []


def test_chats_are_prompt_and_answer_of_transformers_rendering(vocabulary):
    theirs = transformers.AutoTokenizer.from_pretrained(vocabulary.folder)

    def ids(messages, add_generation_prompt):
        return theirs.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False
        )

    made = example(vocabulary, {"messages": [*CHAT, ANSWER]})
    prompt, whole = ids(CHAT, True), ids([*CHAT, ANSWER], False)
    assert made.inputs.tolist() == prompt
    # The answer ends with the token that ends a turn, and the newline after it is not part of it.
    assert made.inputs.tolist() + made.targets.tolist() == whole[: len(prompt) + len(made.targets)]
    assert made.targets[-1] in vocabulary.eos_ids
    rest = theirs.decode(whole[len(prompt) + len(made.targets) :])
    assert rest.strip() == ""
    assert made.target is not None
    assert made.target.endswith("The answer is 7.")
    assert example(vocabulary, {"messages": CHAT}).inputs.tolist() == prompt
    assert json.loads(made.chat) == {"messages": CHAT}


def test_a_target_that_was_cut_off_is_its_text_alone(vocabulary):
    """Nothing ends it, and no template closes the thoughts in which it stops."""
    text = "<think>Ada has 7"
    messages = [*CHAT, {"role": "assistant", "content": text}]
    for row in ({"prompt": "How many?", "completion": text}, {"messages": messages}):
        made = example(vocabulary, {**row, "truncated": True})
        assert made.targets.tolist() == vocabulary.encode(text)
        assert made.target == text
        whole = example(vocabulary, {**row, "truncated": False})
        assert whole.targets[-1] in vocabulary.eos_ids
        assert whole.inputs.tolist() == made.inputs.tolist()
    with pytest.raises(ValueError, match="truncated answer must have a string 'content'"):
        example(vocabulary, {"messages": [*CHAT, {**ANSWER, "content": ["x"]}], "truncated": True})


def test_a_turn_that_ends_no_text_is_warned_of(tmp_path, folders, capsys):
    """As in the folder of a base model, with the template of the chat models."""
    for folder in folders.values():
        example(TokenizerVocabulary(folder), {"messages": CHAT})
    assert capsys.readouterr().err == ""
    base = small_tokenizers.write(tmp_path / "base", "qwen")
    config = json.loads((base / "tokenizer_config.json").read_text())
    text = json.dumps({**config, "eos_token": "<|endoftext|>"})
    (base / "tokenizer_config.json").write_text(text)
    end, turn = map(
        TokenizerVocabulary(base)._tokenizer.token_to_id, small_tokenizers.STOPS["qwen"][::-1]
    )
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    vocabulary = TokenizerVocabulary(base)
    example(vocabulary, {"inputs": "a", "targets": "b"})
    assert capsys.readouterr().err == ""
    example(vocabulary, {"messages": CHAT})
    said = capsys.readouterr().err
    assert f"ends an answer with '<|im_end|>' (ids [{turn}, " in said
    assert "samples go on after the answer" in said


def test_an_answer_across_a_seam_of_tokens_goes_on_from_the_prompt(folders):
    """If the whole chat merges the end of the prompt with the answer, the prompt's ids stay."""
    vocabulary = TokenizerVocabulary(folders["llama"])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    object.__setattr__(vocabulary.chat_template, "templates", {"default": template})
    messages = [{"role": "user", "content": "th"}, {"role": "assistant", "content": "e eggs"}]
    assert vocabulary.encode("th") + vocabulary.encode("e eggs") != vocabulary.encode("the eggs")
    made = example(vocabulary, {"messages": messages})
    assert made.inputs.tolist() == vocabulary.encode("th")
    assert made.targets.tolist() == [*vocabulary.encode("e eggs"), vocabulary.eos_id]


def test_a_template_that_changes_what_is_past_keeps_the_answer(folders):
    vocabulary = TokenizerVocabulary(folders["qwen"])
    template = (
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    object.__setattr__(vocabulary.chat_template, "templates", {"default": template})
    made = example(vocabulary, {"messages": [*CHAT, ANSWER]})
    assert made.targets.tolist() == [*vocabulary.encode(ANSWER["content"]), vocabulary.eos_id]
    with pytest.raises(ValueError, match=r"line 1: .*'content' must then be a string"):
        example(vocabulary, {"messages": [*CHAT, {**ANSWER, "content": None, "thinking": "x"}]})


def test_variables_and_tools_reach_the_template(folders):
    vocabulary = TokenizerVocabulary(folders["qwen"])
    plain = example(vocabulary, {"messages": CHAT}).prompt
    assert plain.endswith("<|im_start|>assistant\n")
    quiet = example(vocabulary, {"messages": CHAT}, {"enable_thinking": False}).prompt
    assert quiet == plain + "<think>\n\n</think>\n\n"
    tools = [{"type": "function", "function": {"name": "größe"}}]
    made = example(vocabulary, {"messages": CHAT, "tools": tools})
    assert json.dumps(tools[0], ensure_ascii=False) in made.prompt
    assert json.loads(made.chat) == {"messages": CHAT, "tools": tools}


def test_calls_that_a_template_leaves_out_are_refused(folders):
    call = {"type": "function", "function": {"name": "count_eggs", "arguments": {}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = {"messages": [{"role": "user", "content": "How many?"}, answer]}
    vocabulary = TokenizerVocabulary(folders["llama"])  # whose template prints contents alone
    with pytest.raises(ValueError, match=r"line 1: .* a call of 'count_eggs', which .* not print"):
        example(vocabulary, row)
    past = [row["messages"][0], answer, {"role": "user", "content": "And now?"}]
    with pytest.raises(ValueError, match=r"line 1: .* a call of 'count_eggs', which .* not print"):
        example(vocabulary, {"messages": past})
    theirs = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    assert "count" not in theirs.apply_chat_template(CHAT, tools=[call], tokenize=False)
    with pytest.raises(ValueError, match=r"line 1: 'tools' have 'count_eggs', which .* not print"):
        example(vocabulary, {"messages": CHAT, "tools": [call]})
    short = {"type": "function", "function": {"name": "us"}}  # which is a part of "user"
    with pytest.raises(ValueError, match=r"line 1: 'tools' have 'us', which .* not print"):
        example(vocabulary, {"messages": CHAT, "tools": [short]})
    printed = {**answer, "content": "count_eggs()"}
    assert example(vocabulary, {"messages": [row["messages"][0], printed]}).target == "count_eggs()"


def test_messages_that_a_template_does_not_print_are_refused(folders):
    """transformers makes ids of these, and a run would be trained on them."""
    theirs = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    vocabulary = TokenizerVocabulary(folders["llama"])
    question = {"role": "user", "content": "How many?"}
    parts = [{"type": "text", "text": "How many?"}]
    chat = [{"role": "user", "content": parts}]
    assert "[{'type': 'text'" in str(theirs.apply_chat_template(chat, tokenize=False))
    for messages in (chat, [question, {"role": "assistant", "content": parts}]):
        with pytest.raises(ValueError, match=r"line 1: message \d has a list .* as \"\[\{'type'"):
            example(vocabulary, {"messages": messages})
    rules = [{"role": "developer", "content": 'Say "no"\nor "yes".'}, question]
    quoted = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    known = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"
    assert "yes" not in theirs.apply_chat_template(rules, chat_template=known, tokenize=False)
    object.__setattr__(vocabulary.chat_template, "templates", {"default": quoted})
    assert (
        example(vocabulary, {"messages": rules}).prompt
        == r'"Say \"no\"\nor \"yes\"."' + '"How many?"'
    )
    object.__setattr__(vocabulary.chat_template, "templates", {"default": known})
    for role in ("developer", "system", "tool"):
        said = rf"message 1 has the role '{role}', of which .* nothing"
        with pytest.raises(ValueError, match=said):
            example(vocabulary, {"messages": [{**rules[0], "role": role}, question]})
    first = "{{ messages[0].content[0].text }}"
    object.__setattr__(vocabulary.chat_template, "templates", {"default": first})
    assert example(vocabulary, {"messages": chat}).prompt == "How many?"
    both = [{"role": "user", "content": [*parts, {"type": "text", "text": "Count twice."}]}]
    with pytest.raises(ValueError, match=r"nothing or a part: 'Count twice\.' is missing"):
        example(vocabulary, {"messages": both})


def test_a_rendered_chat_read_as_a_text_begins_once(folders):
    """A rendered chat already begins with BOS, which is not added again."""
    vocabulary = TokenizerVocabulary(folders["llama"])
    chat = example(vocabulary, {"messages": CHAT})
    text = example(vocabulary, {"inputs": chat.prompt, "targets": "7"})
    assert text.inputs.tolist() == chat.inputs.tolist()
    assert chat.inputs.tolist().count(vocabulary.bos_id) == 1


def test_a_template_s_date_does_not_change_the_stream(folders):
    vocabulary = TokenizerVocabulary(folders["llama"])
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    object.__setattr__(vocabulary.chat_template, "templates", {"default": template})
    assert example(vocabulary, {"messages": CHAT}).prompt.startswith("26 Jul 2024")


# Splits -------------------------------------------------------------------------------------------


def test_a_file_alone_has_one_split_and_says_how_to_get_another(tmp_path):
    task = open_task(write(tmp_path / "data.jsonl", pairs(3)))
    assert list(task.splits) == ["train"]
    assert texts(task) == ["in 0", "in 1", "in 2"]
    with pytest.raises(
        ValueError,
        match=r"data\.jsonl' has no split 'validation'.*validation\.jsonl.*EVAL_FRACTION",
    ):
        named_tasks.check_split(task, "validation")


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("data.jsonl", "validation.jsonl"),
        ("data.jsonl.gz", "validation.jsonl"),
        ("data.jsonl", "validation.jsonl.gz"),
        ("data.jsonl", "data.validation.jsonl"),
        ("gsm_train.jsonl", "gsm_validation.jsonl"),
        ("train.jsonl", "validation.jsonl"),
    ],
)
def test_the_validation_file_beside_a_file_is_found(tmp_path, train, validation):
    path = write(tmp_path / train, pairs(3))
    write(tmp_path / validation, pairs(2, "other"))
    write(tmp_path / "more.jsonl", pairs(1))
    task = open_task(path)
    assert texts(task, "validation") == ["other 0", "other 1"]
    assert texts(task) == ["in 0", "in 1", "in 2"]
    named_tasks.check_split(task, "validation")


def test_a_validation_file_is_not_its_own(tmp_path):
    path = write(tmp_path / "validation.jsonl", pairs(2))
    assert list(open_task(path).splits) == ["train"]


def test_a_folder_without_a_slash_is_answered_with_one(tmp_path, monkeypatch):
    write(tmp_path / "chats" / "train.jsonl", pairs(3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"unknown task or mixture 'chats'; write '\./chats'"):
        open_task("chats")
    assert texts(open_task("./chats")) == ["in 0", "in 1", "in 2"]


def test_folders_have_the_splits_that_are_there(tmp_path):
    write(tmp_path / "chats" / "train.jsonl.gz", pairs(3))
    write(tmp_path / "chats" / "test.jsonl", pairs(1, "test"))
    for name in (tmp_path / "chats", f"{tmp_path}/chats/"):
        task = open_task(name)
        assert list(task.splits) == ["train", "test"]
        assert texts(task, "test") == ["test 0"]
    with pytest.raises(FileNotFoundError, match=r"expected .*train\.jsonl.*none at .*absent"):
        open_task(tmp_path / "absent")
    write(tmp_path / "data.json", pairs(3))
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.jsonl\.gz, got .*data\.json"):
        open_task(tmp_path / "data.json")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.jsonl"):
        open_task(tmp_path / "absent.jsonl").get_dataset(LENGTHS, split="train")


@pytest.mark.parametrize("name", ["", "train.jsonl"])
def test_a_split_that_is_there_plain_and_compressed_is_refused(tmp_path, name):
    write(tmp_path / "train.jsonl", pairs(3))
    write(tmp_path / "validation.jsonl", pairs(3))
    write(tmp_path / "validation.jsonl.gz", pairs(2))
    both = r"both '.*validation\.jsonl' and '.*validation\.jsonl\.gz': remove one"
    with pytest.raises(ValueError, match=both):
        open_task(tmp_path / name)


def test_a_share_is_held_out_by_seed_and_row_and_never_trained_on(tmp_path):
    path = write(tmp_path / "data.jsonl", pairs(400))
    chosen = []
    for seed in (0, 0, 1):
        task = open_task(path, eval_fraction=0.1, seed=seed)
        train, held = texts(task), texts(task, "validation")
        assert sorted([*train, *held]) == sorted(f"in {i}" for i in range(400))
        assert 15 < len(held) < 70
        assert held == sorted(held, key=lambda text: int(text.split()[1]))
        chosen.append(held)
    assert chosen[0] == chosen[1] != chosen[2]
    # A larger share holds the same rows out and more; a longer file changes no earlier row.
    larger = texts(open_task(path, eval_fraction=0.2), "validation")
    assert set(chosen[0]) < set(larger)
    longer = write(tmp_path / "longer.jsonl", pairs(500))
    assert texts(open_task(longer, eval_fraction=0.1), "validation")[: len(chosen[0])] == chosen[0]


def test_shares_that_cannot_be_held_out_are_refused(tmp_path):
    path = write(tmp_path / "data.jsonl", pairs(2))
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=r"eval_fraction must lie in \(0, 1\), got"):
            open_task(path, eval_fraction=fraction)
    task = open_task(path, eval_fraction=1e-9)
    with pytest.raises(ValueError, match=r"none for 'validation', of 2: raise EVAL_FRACTION"):
        texts(task, "validation")
    with pytest.raises(ValueError, match=r"the task 'arithmetic', .* --gin\.EVAL_FRACTION=None"):
        open_task("arithmetic", eval_fraction=0.1)
    with pytest.raises(ValueError, match=r"unknown task or mixture 'data\.json'"):
        open_task("data.json", eval_fraction=0.1)
    write(tmp_path / "validation.jsonl", pairs(1))
    with pytest.raises(ValueError, match=r"files of its own.*--gin\.EVAL_FRACTION=None"):
        open_task(path, eval_fraction=0.1)


# Long prompts -------------------------------------------------------------------------------------


def long_file(tmp_path, name="data.jsonl"):
    lengths = [10, 63, 64, 200]  # bytes; one more token for EOS
    return write(
        tmp_path / name, [{"inputs": "x" * (n - 1) + "y", "targets": "b"} for n in lengths]
    )


@pytest.mark.parametrize(("chosen", "kept"), [("skip", [10, 63]), ("cut", [10, 63, 63, 63])])
def test_long_prompts_are_skipped_or_lose_their_beginning(tmp_path, capsys, chosen, kept):
    task = open_task(long_file(tmp_path), long_prompts=chosen)
    for _ in range(2):
        dataset = task.get_dataset(LENGTHS, split="train", shuffle=False)
        ids = [row["inputs"].tolist() for row in dataset.as_numpy_iterator()]
        assert ids == [[ord("x") + 3] * (n - 1) + [ord("y") + 3, 1] for n in kept]
    said = capsys.readouterr().err
    assert said.count("2 of 4 prompts (50.0 %) are longer than 64 tokens") == 1
    assert ("skipped" if chosen == "skip" else "cut from the left") in said


def test_a_prompt_that_begins_with_bos_keeps_it(folders):
    vocabulary = TokenizerVocabulary(folders["llama"])
    ids = np.array(vocabulary.encode_prompt("the quick brown fox"))
    assert row_ids.cut(ids, 3, vocabulary).tolist() == [ids[0], *ids[-2:]]
    assert row_ids.cut(ids, len(ids), vocabulary).tolist() == ids.tolist()
    assert row_ids.cut(ids, 1, vocabulary).tolist() == [ids[-1]]
    assert row_ids.cut(ids[1:], 3, vocabulary).tolist() == ids[-3:].tolist()


def test_all_prompts_too_long_and_unknown_ways(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"inputs": "x" * 200, "targets": "b"}] * 3)
    with pytest.raises(
        ValueError, match=r"split .train.: all 3 prompts are longer than 64 tokens\. TASK_FEATURE"
    ):
        texts(open_task(path))
    with pytest.raises(ValueError, match="long_prompts must be 'skip' or 'cut', got 'left'"):
        open_task(path, long_prompts="left")


def test_long_targets_are_cut_without_an_end(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"inputs": "a", "targets": "b" * 60}])
    dataset = open_task(path).get_dataset(LENGTHS, split="train", shuffle=False)
    (row,) = dataset.as_numpy_iterator()
    assert row["targets"].tolist() == [ord("b") + 3] * 48
    assert row["targets_tokens"] == 61


def test_examples_read_in_order_are_those_of_seqio(tmp_path):
    rows = [*pairs(3), {"inputs": "alone"}]
    rows = [{**row, "teacher_inputs": "b" * (9 * i + 1)} for i, row in enumerate(rows)]
    path = write(tmp_path / "data.jsonl", rows)
    both, all_three = ("inputs", "targets"), ("inputs", "targets", "teacher_inputs")
    # Decoding gives the teacher's prompts no length.
    for names, limited in ((both, both), (all_three, all_three), (all_three, both)):
        lengths = dict.fromkeys(limited, 4)  # shorter than some of the texts
        task = open_task(path, feature_lengths=dict.fromkeys(names, 100))
        ours = list(Split(task, "train", lengths).in_order())
        theirs = list(task.get_dataset(lengths, split="train", shuffle=False).as_numpy_iterator())
        assert len(ours) == len(theirs) == 4
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            for name, value in other.items():
                np.testing.assert_array_equal(mine[name], value)


# Prompts without targets --------------------------------------------------------------------------


def test_prompts_without_targets_have_no_weights_and_are_found(tmp_path):
    path = write(tmp_path / "data.jsonl", [*pairs(2), {"inputs": "alone"}])
    task = open_task(path)
    config = data.DataConfig(task=path, feature_lengths=LENGTHS, batch_size=3, vocabulary="bytes")
    batch = next(streams.TrainIterator({task.name: task}, config))
    only = batch.input_lengths == 6  # "alone" and EOS
    assert batch.weights[only].sum() == 0
    assert batch.targets[only].sum() == 0
    assert (batch.weights[~only].sum(axis=1) == 6).all()  # "out 0" and EOS
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: .*got only a prompt: lambda is 0"):
        named_tasks.check_targets(task, "train", "lambda is 0")
    named_tasks.check_targets(
        open_task(write(tmp_path / "all.jsonl", pairs(2))), "train", "lambda is 0"
    )


def test_metrics_count_rows_with_targets_only(tmp_path):
    path = write(tmp_path / "data.jsonl", [*pairs(2), {"inputs": "alone"}])
    task = open_task(path)
    examples = list(task.get_dataset(LENGTHS, split="train", shuffle=False).as_numpy_iterator())
    targets = [
        task.postprocess_fn(x["targets_pretokenized"].decode(), example=x, is_target=True)
        for x in examples
    ]
    assert targets == ["out 0", "out 1", None]
    (metric,) = task.metric_fns
    assert metric(targets, ["out 0", "no", ""]) == {"exact_match": 50.0}
    assert metric([None], ["x"]) == {}


# In a run -----------------------------------------------------------------------------------------


def test_the_stream_gives_lengths_and_can_be_saved(tmp_path, folders):
    """Id 0 is a token in these prompts, so only the lengths show where they end."""
    path = write(
        tmp_path / "data.jsonl", [{"prompt": "!" * (i + 1), "completion": "!"} for i in range(6)]
    )
    settings = {"vocabulary": str(folders["qwen"]), "length_buckets": (4,)}
    for buckets in ((), (4,)):
        settings["length_buckets"] = buckets
        task = open_task(path, **settings)
        config = data.DataConfig(task=path, feature_lengths=LENGTHS, batch_size=2, **settings)
        stream = streams.TrainIterator({task.name: task}, config)
        for _ in range(3):
            batch = next(stream)
            assert batch.input_lengths.dtype == np.int32
            assert set(batch.input_lengths) <= set(range(1, 7))
            assert not batch.inputs.any()
        stream.save(tmp_path)
        expected = next(stream)
        resumed = streams.TrainIterator({task.name: task}, config)
        resumed.restore(tmp_path)
        for one, other in zip(next(resumed), expected, strict=True):
            assert one is other is None or np.array_equal(one, other)


def test_evaluation_gives_lengths_and_fills_up_with_rows_of_one_token(tmp_path, folders):
    path = write(tmp_path / "data.jsonl", pairs(3))
    task = open_task(path, vocabulary=str(folders["qwen"]))
    batches = list(padded_batches.in_order(Split(task, "train", LENGTHS), 2))
    assert [len(batch.examples) for batch in batches] == [2, 1]
    expected = [len(vocabularies.of_folder(folders["qwen"]).encode(f"in {i}")) for i in range(3)]
    assert [int(n) for batch in batches for n in batch.batch.input_lengths] == [*expected, 1]


def test_registered_tasks_take_a_folder_s_tokenizer(folders):
    for kind, path in folders.items():
        task = open_task("arithmetic", vocabulary=str(path))
        vocabulary = TokenizerVocabulary(path)
        row = next(task.get_dataset(LENGTHS, split="test", shuffle=False).as_numpy_iterator())
        prompt, target = (row[f"{x}_pretokenized"].decode() for x in ("inputs", "targets"))
        assert row["inputs"].tolist() == vocabulary.encode_prompt(prompt)[:64], kind
        assert row["targets"].tolist() == [*vocabulary.encode(target)[:47], vocabulary.eos_id]


def test_names_are_of_the_file_and_differ_by_folder(tmp_path):
    assert task_names.display_name("/a/b/chats.jsonl") == "chats.jsonl"
    assert task_names.display_name("/a/chats/") == "chats"
    assert task_names.display_name("gsm8k") == "gsm8k"
    names = {jsonl.task_name(str(tmp_path / path)) for path in ("a/x.jsonl", "x.jsonl")}
    assert len(names) == 2


def test_a_task_is_pickled_without_its_examples_and_keeps_its_vocabulary(tmp_path):
    path = write(tmp_path / "teacher outputs.jsonl", pairs(4))
    config = data.DataConfig(task=path, feature_lengths=LENGTHS, batch_size=2)
    task = jsonl.make_task(config, BYTES)
    assert texts(task, feature="targets") == [f"out {i}" for i in range(4)]
    source = pickle.loads(pickle.dumps(task.source))
    assert len(list(source.get_dataset(split="train"))) == 4
    words = jsonl.make_task(config, vocabularies.arithmetic())
    copy = task.replace(output_features=words.output_features)
    with pytest.raises(ValueError, match="has the vocabulary it was made with"):
        next(Split(copy, "train", LENGTHS).in_order())
    with pytest.raises(ValueError, match="has the vocabulary it was made with"):
        texts(copy)


# Rows that name their teacher ---------------------------------------------------------------------


TAUGHT = [
    {"inputs": f"in {i}", "targets": f"out {i}", "teacher": "ab"[i % 3 > 1]} for i in range(30)
]
OF = {name: [row["inputs"] for row in TAUGHT if row["teacher"] == name] for name in "ab"}


def test_a_name_may_select_the_rows_of_one_teacher(tmp_path):
    path = write(tmp_path / "data.jsonl", TAUGHT)
    write(tmp_path / "data.validation.jsonl", TAUGHT[:5])
    folder = tmp_path / "folder"
    write(folder / "train.jsonl.gz", TAUGHT)
    for name in "ab":
        task = open_task(f"{path}:{name}")
        assert texts(task) == texts(open_task(f"{folder}/:{name}")) == OF[name]
        assert texts(task, "validation") == [text for text in OF[name] if int(text[3:]) < 5]
        assert task.name != open_task(path).name
    copy = write(tmp_path / "copy" / "data.jsonl", TAUGHT)
    whole = open_task(copy, eval_fraction=0.3)
    parts = [open_task(f"{copy}:{name}", eval_fraction=0.3) for name in "ab"]
    for split in ("train", "validation"):  # the same lines are held out
        assert sorted(texts(whole, split)) == sorted(
            text for part in parts for text in texts(part, split)
        )


@pytest.mark.parametrize(
    ("name", "path", "teacher", "shown"),
    [
        ("./data.jsonl:a b", "./data.jsonl", "a b", "data.jsonl:a b"),
        ("gs://bucket/x.jsonl.gz:a", "gs://bucket/x.jsonl.gz", "a", "x.jsonl.gz:a"),
        ("data.jsonl:c:d", "data.jsonl", "c:d", "data.jsonl:c:d"),
        ("/data/folder/:a", "/data/folder/", "a", "folder:a"),
        ("gs://bucket/folder", "gs://bucket/folder", None, "folder"),
        ("/data/12:30.jsonl", "/data/12:30.jsonl", None, "12:30.jsonl"),
        ("/data/at:noon", "/data/at:noon", None, "at:noon"),
        ("x.jsonl:a/b.jsonl", "x.jsonl:a/b.jsonl", None, "b.jsonl"),
    ],
)
def test_only_a_colon_behind_a_file_or_a_slash_selects_rows(name, path, teacher, shown):
    assert task_names.split(name) == (path, teacher)
    assert task_names.is_path(name)
    assert task_names.display_name(name) == shown


def test_a_field_teacher_that_nobody_asks_for_is_left_alone_with_a_warning(tmp_path, capsys):
    path = write(tmp_path / "named.jsonl", TAUGHT)
    assert len(texts(open_task(path))) == 30
    assert f"the task '{path}:NAME' has the rows of one teacher" in capsys.readouterr().err
    others = [{**row, "teacher": value} for row, value in zip(TAUGHT, (None, 3, {}), strict=False)]
    assert len(texts(open_task(write(tmp_path / "others.jsonl", others)))) == 3
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "names", "message"),
    [
        ({"teacher": "c"}, "ab", 'line 3: \'teacher\' must be "a" or "b", got "c"'),
        ({"teacher": None}, "ab", 'line 3: \'teacher\' must be "a" or "b", got none'),
        ({"teacher": ["a"]}, "ab", 'line 3: \'teacher\' must be "a" or "b", got ["a"]'),
        ({}, "abc", "no line has the 'teacher' \"c\""),
        ({}, "a", 'line 3: \'teacher\' must be "a", got "b"'),
    ],
)
def test_rows_and_tasks_name_the_same_teachers(tmp_path, changed, names, message):
    path = write(tmp_path / "x.jsonl", [*TAUGHT[:2], {**TAUGHT[2], **changed}, *TAUGHT[3:]])
    config = data.DataConfig(
        task={f"{path}:{name}": 2 for name in names},
        feature_lengths=LENGTHS,
        batch_size=2 * len(names),
        vocabulary="bytes",
    )
    tasks, _ = named_tasks.open_tasks(config)
    with pytest.raises(ValueError, match=re.escape(path) + "(, |: )" + re.escape(message)):
        streams.TrainIterator(tasks, config)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        flan.read_file(str(tmp_path / "absent.jsonl"))
    path = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty\.jsonl: .*empty file"):
        texts(open_task(path))


@pytest.mark.parametrize(("kind", "kept"), [("bytes", 8), ("qwen", 8)])
def test_lines_of_a_text_file_are_prompts(tmp_path, folders, capsys, kind, kept):
    path = tmp_path / "x.txt"
    path.write_text("one\u2028line\n" + "0123456789" * 2 + "\n")
    vocabulary = BYTES if kind == "bytes" else TokenizerVocabulary(folders[kind])
    first, second = row_ids.read_prompts(path, vocabulary, kept)
    assert first["inputs_pretokenized"] == "one\u2028line"
    assert second["inputs"].tolist() == row_ids.prompt_ids(vocabulary, "0123456789" * 2)[-kept:]
    assert len(second["targets"]) == 0
    assert "longer than 8 tokens and cut from the left" in capsys.readouterr().err
    path.write_text("one\n\nthree\n")
    with pytest.raises(ValueError, match=r"x\.txt, line 2: expected a prompt with text"):
        row_ids.read_prompts(path, vocabulary, kept)
