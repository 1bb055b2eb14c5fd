"""The tasks `bbh_direct` and `bbh_cot` of BIG-Bench Hard (Suzgun et al., 2022).

There is also a task for each file: `bbh_direct_<name>` and `bbh_cot_<name>`. The folder DATA_DIR,
or its folder `bbh`, must hold bbh/<name>.json and cot-prompts/<name>.txt of
https://github.com/suzgunmirac/BIG-Bench-Hard: 27 files with 6,511 examples, which are the split
`test`. A prompt has three worked examples:

    bbh_direct  <instruction> Q: <question> A: False <two more> Q: <question> A:
    bbh_cot     <instruction> Q: <question> A: Let's think step by step. <...> So the answer is
                False. <two more> Q: <question> A: Let's think step by step.
    targets     True

The direct prompts are the chain-of-thought prompts reduced to the final answers. If a prompt is too
long, only its first worked examples are kept (`few_shot.join_prompt`). With T5's vocabulary, all
three examples fit into 2048 tokens in every prompt; into 1024 tokens they fit in 96 % of the direct
prompts and in 74 % of the chain-of-thought prompts. Newlines in the files become spaces, because
T5's vocabulary has no newline. T5's vocabulary also lacks `<`, `{` and `}`, which `dyck_languages`
needs.

For `bbh_direct`, the predicted answer is the text before a further `Q:`. For `bbh_cot` it is the
part of that text after `the answer is`, without the period at the end. An answer is correct if it
equals the target exactly. `accuracy` is the mean over the 27 files. The GKD paper averages over 23
tasks, where the three files of logical_deduction count as one task, as do the three files of
tracking_shuffled_objects; `accuracy_23_tasks` is this mean. The examples of the files alternate in
the dataset, so that the first N examples come from all files.
"""

from collections.abc import Mapping, Sequence
import functools
import os
import re
from typing import Any

import tensorflow as tf

from gkd_jax.tasks import features, few_shot, folder
from gkd_jax.text import files, text_metrics


NUM_SHOTS = 3
STEP_BY_STEP = "Let's think step by step."
_FILES = """
    boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages
    formal_fallacies geometric_shapes hyperbaton logical_deduction_five_objects
    logical_deduction_seven_objects logical_deduction_three_objects movie_recommendation
    multistep_arithmetic_two navigate object_counting penguins_in_a_table
    reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies
    word_sorting
"""
FILES = tuple(_FILES.split())


def read_file(data_dir: str, name: str, *, cot: bool) -> few_shot.Group:
    """Returns the prompt and the questions of one file.

    Args:
        data_dir: the folder with bbh/ and cot-prompts/.
        name: one of `FILES`.
        cot: whether the prompt has chains of thought.

    Raises:
        FileNotFoundError: if a file is missing; the message names the file and the folder.
        ValueError: if a file is not as expected; the message names the file, and the line or the
            number of the example.
    """
    header, shots = _read_prompt(os.path.join(data_dir, "cot-prompts"), f"{name}.txt", cot)
    lead = f"A: {STEP_BY_STEP}" if cot else "A:"
    rows = _read_examples(os.path.join(data_dir, "bbh"), f"{name}.json")
    questions = [(f"Q: {question} {lead}", target) for question, target in rows]
    return few_shot.Group(name, header, shots, questions)


def _read_prompt(where: str, name: str, cot: bool) -> tuple[str, list[str]]:
    """Returns the header of a prompt file and the texts of its worked examples."""
    path = os.path.join(where, name)
    lines = folder.read_lines(where, name)
    # The lines above "-----" are a note to people who collect training data and no part of the
    # prompt. They are replaced by empty lines, so that error messages have the file's line numbers.
    above = lines.index("-----") + 1 if "-----" in lines else 0
    header, shots = few_shot.parse_shots([""] * above + lines[above:], path)
    if len(shots) != NUM_SHOTS:
        raise ValueError(f"{path}: expected {NUM_SHOTS} lines with 'Q:', got {len(shots)}")
    texts = []
    for shot in shots:
        answer = text_metrics.stated_answer(shot.answer)
        if answer is None:
            raise ValueError(
                f"{path}, line {shot.line}: the answer must say 'So the answer is ...', "
                f"got {shot.answer[-60:]!r}"
            )
        texts.append(shot.text() if cot else shot._replace(answer=answer).text())
    return header, texts


def _read_examples(where: str, name: str) -> list[tuple[str, str]]:
    """Returns the question and the target of each example in a JSON file."""
    path = os.path.join(where, name)
    content = files.parse_json("\n".join(folder.read_lines(where, name)), path, None)
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list) or not examples:
        raise ValueError(f"{path}: expected an object with a list 'examples' that is not empty")
    rows = []
    for number, example in enumerate(examples, start=1):
        match example:
            case {"input": str(question), "target": str(target)}:
                rows.append((few_shot.one_line(question), few_shot.one_line(target)))
            case _:
                raise ValueError(
                    f"{path}, example {number}: expected an object with the strings 'input' and "
                    f"'target', got {example!r}"
                )
    return rows


def answer(
    text: str, *, example: Mapping[str, Any], is_target: bool = False, cot: bool
) -> str | tuple[str, str]:
    """Returns the answer in a prediction, or (file, target): a seqio postprocess_fn.

    With `cot`, the answer is what the prediction states after a chain of thought, or "" if it
    states none.
    """
    if is_target:
        return few_shot.with_group(text, example=example, is_target=True)
    first = few_shot.until_next_question(text)
    return (text_metrics.stated_answer(first) or "") if cot else first


def mean_over_tasks(
    targets: Sequence[tuple[str, str]], predictions: Sequence[str]
) -> dict[str, float]:
    """Returns {"accuracy_23_tasks": the mean accuracy over tasks, in percent}.

    Files that differ only in the number of objects count as one task.

    Args:
        targets: (file, correct answer) of each example.
        predictions: the predicted answers.
    """
    merged = [(re.sub(r"_(three|five|seven)_objects$", "", name), text) for name, text in targets]
    value = text_metrics.grouped_exact_match(merged, predictions)["accuracy"]
    return {"accuracy_23_tasks": value}


def _dataset(split: str, names: Sequence[str], cot: bool) -> tf.data.Dataset:
    del split  # There is only one.
    data_dir = folder.family_folder("bbh", "bbh", "cot-prompts")
    return few_shot.group_dataset([read_file(data_dir, name, cot=cot) for name in names])


def _register(name: str, names: Sequence[str], *, cot: bool) -> None:
    """Registers a task that is made of some of the files, with or without chains of thought."""
    whole = len(names) == len(FILES)
    dataset = functools.partial(_dataset, names=names, cot=cot)
    features.register(
        name,
        source=features.Table(dataset, ["test"]),
        tokenize=few_shot.TOKENIZE,
        metric_fns=[text_metrics.grouped_exact_match, *([mean_over_tasks] if whole else [])],
        postprocess_fn=functools.partial(answer, cot=cot),
    )


for _kind in ("direct", "cot"):
    _register(f"bbh_{_kind}", FILES, cot=_kind == "cot")
    for _name in FILES:
        _register(f"bbh_{_kind}_{_name}", (_name,), cot=_kind == "cot")
