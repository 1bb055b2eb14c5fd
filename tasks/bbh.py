"""BIG-Bench Hard (Suzgun et al., 2022): `bbh_direct` and `bbh_cot`, and one task each file.

DATA_DIR, or its folder `bbh`, holds bbh/<name>.json and cot-prompts/<name>.txt of
https://github.com/suzgunmirac/BIG-Bench-Hard: 27 files, 6,511 examples, split `test`. 3-shot:

    bbh_direct  <instruction> Q: <question> A: False <two more> Q: <question> A:
    bbh_cot     <instruction> Q: <question> A: Let's think step by step. <...> So the answer is
                False. <two more> Q: <question> A: Let's think step by step.
    targets     True

The direct prompts are the chain-of-thought prompts with only the final answers left. Of the three
worked examples the first are kept, as many as fit (`few_shot.join_prompt`): at 2048 tokens of T5
all; at 1024 all in 96 % of the direct prompts and in 74 % of the others. Where the files have
newlines there are spaces, since T5's vocabulary has no newline; nor has it `<`, `{` and `}`, which
`dyck_languages` needs.

A prediction is right if it equals the target exactly: all of it up to a further `Q:`, and for
`bbh_cot` what follows `the answer is`, without the period at the end. `accuracy` is the mean over
the 27 files. BBH counts as 23 tasks (the GKD paper averages over those), since the three files of
logical_deduction are one task and so are the three of tracking_shuffled_objects:
`accuracy_23_tasks` is the mean over them. The files take turns in the stream, so that the first N
examples are of all of them.
"""

from collections.abc import Mapping, Sequence
import functools
import os
import re
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.tasks import few_shot, folder
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
    """The prompt and the questions of one file.

    Args:
        data_dir: with bbh/ and cot-prompts/.
        name: one of FILES.
        cot: whether the prompt shows chains of thought.

    Raises:
        FileNotFoundError: naming file and folder.
        ValueError: naming the file, the line or example (from 1), and what is wrong with it.
    """
    header, shots = _read_prompt(os.path.join(data_dir, "cot-prompts"), f"{name}.txt", cot)
    lead = f"A: {STEP_BY_STEP}" if cot else "A:"
    rows = _read_examples(os.path.join(data_dir, "bbh"), f"{name}.json")
    questions = [(f"Q: {question} {lead}", target) for question, target in rows]
    return few_shot.Group(name, header, shots, questions)


def _read_prompt(where: str, name: str, cot: bool) -> tuple[str, list[str]]:
    path = os.path.join(where, name)
    lines = folder.read_lines(where, name)
    # What is above the rule is a note to those who collect training data. Its lines are blanked,
    # not removed, so that messages count lines as an editor does.
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


def direct_answer(
    text: str, *, example: Mapping[str, Any], is_target: bool = False
) -> str | tuple[str, str]:
    """seqio's postprocess_fn of `bbh_direct`."""
    if is_target:
        return few_shot.with_group(text, example=example, is_target=True)
    return few_shot.until_next_question(text)


def cot_answer(
    text: str, *, example: Mapping[str, Any], is_target: bool = False
) -> str | tuple[str, str]:
    """seqio's postprocess_fn of `bbh_cot`: a prediction without a stated answer becomes empty."""
    if is_target:
        return few_shot.with_group(text, example=example, is_target=True)
    return text_metrics.stated_answer(few_shot.until_next_question(text)) or ""


def mean_over_tasks(
    targets: Sequence[tuple[str, str]], predictions: Sequence[str]
) -> dict[str, float]:
    """`accuracy_23_tasks`: the files of different sizes of a problem count as one task."""
    merged = [(re.sub(r"_(three|five|seven)_objects$", "", name), text) for name, text in targets]
    value = text_metrics.grouped_exact_match(merged, predictions)["accuracy"]
    return {"accuracy_23_tasks": value}


def _dataset(
    split: str,
    shuffle_files: bool,
    seed: int | None = None,
    *,
    names: Sequence[str] = FILES,
    cot: bool = False,
) -> tf.data.Dataset:
    del split, shuffle_files, seed  # one table in memory: seqio shuffles it
    data_dir = few_shot.family_folder("bbh", "bbh", "cot-prompts")
    return few_shot.group_dataset([read_file(data_dir, name, cot=cot) for name in names])


def _register(kind: str, name: str, names: Sequence[str]) -> None:
    whole = len(names) == len(FILES)
    few_shot.register(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, names=names, cot=kind == "cot"), splits=["test"]
        ),
        metric_fns=[text_metrics.grouped_exact_match, *([mean_over_tasks] if whole else [])],
        postprocess_fn=cot_answer if kind == "cot" else direct_answer,
    )


for _kind in ("direct", "cot"):
    _register(_kind, f"bbh_{_kind}", FILES)
    for _name in FILES:
        _register(_kind, f"bbh_{_kind}_{_name}", (_name,))
