"""MMLU (Hendrycks et al., 2021): `mmlu`, 57 subjects of multiple choice, and `mmlu_<subject>`.

DATA_DIR, or its folder `mmlu`, holds dev/, val/ and test/ with <subject>_{dev,val,test}.csv, plain
or `.gz`, as https://github.com/hendrycks/test has them: question, four options, letter; no header.

    inputs:  The following are multiple choice questions (with answers) about abstract algebra.
             <question> A. <option> B. <option> C. <option> D. <option> Answer: B <...> Answer:
    targets: C

5-shot: the five questions of dev come first. Where not all fit the feature length, the first k do,
as in the authors' `evaluate.py` (`few_shot.join_prompt`). At 1024 tokens of T5 81 % of the test
prompts keep all, at 2048 97 % (all but 404); alone, the longest question has 1092. Where the
authors have newlines there are spaces, since T5's vocabulary has no newline.

`accuracy` is the share of exactly right letters in each subject, averaged over the subjects, each
with the same weight. Greedy decoding may write no letter at all; the authors compare A to D alone,
which `EvalConfig.decoding = "likeliest"` does. Splits `test` (14,042 questions) and `validation`
(1,531). The subjects take turns in the stream, so that the first N examples are of all of them.
"""

from collections.abc import Sequence
import csv
import functools
import os

import seqio
import tensorflow as tf

from gkd_jax.tasks import few_shot, folder
from gkd_jax.text import text_metrics


LETTERS = ("A", "B", "C", "D")
NUM_SHOTS = 5
SPLITS = {"test": "test", "validation": "val"}
_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
    college_chemistry college_computer_science college_mathematics college_medicine
    college_physics computer_security conceptual_physics econometrics electrical_engineering
    elementary_mathematics formal_logic global_facts high_school_biology high_school_chemistry
    high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality
    international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology
    public_relations security_studies sociology us_foreign_policy virology world_religions
"""
SUBJECTS = tuple(_SUBJECTS.split())


def read_subject(data_dir: str, subject: str, split: str) -> few_shot.Group:
    """The prompt and the questions of a subject.

    Args:
        data_dir: with dev/ and the split's folder.
        subject: one of SUBJECTS.
        split: one of SPLITS.

    Raises:
        FileNotFoundError: naming file and folder.
        ValueError: naming file and line, and what is wrong with it.
    """
    solved = _read_csv(data_dir, "dev", subject)
    if len(solved) < NUM_SHOTS:
        raise ValueError(
            f"{subject}_dev.csv in {data_dir!r} must have {NUM_SHOTS} questions or more, "
            f"got {len(solved)}"
        )
    about = subject.replace("_", " ")
    return few_shot.Group(
        subject,
        f"The following are multiple choice questions (with answers) about {about}.",
        [f"{question} {letter}" for question, letter in solved[:NUM_SHOTS]],
        _read_csv(data_dir, SPLITS[split], subject),
    )


def _read_csv(data_dir: str, part: str, subject: str) -> list[tuple[str, str]]:
    where, name = os.path.join(data_dir, part), f"{subject}_{part}.csv"
    lines = folder.read_lines(where, name)
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    rows = []
    try:
        for row in reader:
            if len(row) != 2 + len(LETTERS) or row[-1] not in LETTERS:
                raise csv.Error(f"expected a question, four options and A, B, C or D; got {row}")
            question, *options, letter = map(few_shot.one_line, row)
            marked = [f"{mark}. {text}" for mark, text in zip(LETTERS, options, strict=True)]
            rows.append((" ".join([question, *marked, "Answer:"]), letter))
    except csv.Error as error:
        message = f"{os.path.join(where, name)}, line {reader.line_num}: {error}"
        raise ValueError(message) from None
    if not rows:
        raise ValueError(f"{os.path.join(where, name)}: expected questions, got an empty file")
    return rows


def _dataset(
    split: str, shuffle_files: bool, seed: int | None = None, *, subjects: Sequence[str] = SUBJECTS
) -> tf.data.Dataset:
    del shuffle_files, seed  # one table in memory: seqio shuffles it
    data_dir = few_shot.family_folder("mmlu", "mmlu", "dev")
    return few_shot.group_dataset([read_subject(data_dir, subject, split) for subject in subjects])


def _register(name: str, subjects: Sequence[str]) -> None:
    few_shot.register(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, subjects=subjects), splits=list(SPLITS)
        ),
        metric_fns=[text_metrics.grouped_exact_match],
        postprocess_fn=few_shot.with_group,
    )


_register("mmlu", SUBJECTS)
for _subject in SUBJECTS:
    _register(f"mmlu_{_subject}", (_subject,))
