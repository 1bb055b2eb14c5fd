"""The tasks `mmlu` and `mmlu_<subject>` of MMLU (Hendrycks et al., 2021), 57 subjects.

DATA_DIR, or its folder `mmlu`, must hold the folders dev/, val/ and test/ of
https://github.com/hendrycks/test with the files <subject>_{dev,val,test}.csv, plain or as `.gz`.
A file has the columns question, four options and letter, and no header.

    inputs:  The following are multiple choice questions (with answers) about abstract algebra.
             <question> A. <option> B. <option> C. <option> D. <option> Answer: B <...> Answer:
    targets: C

A prompt begins with the five questions of dev. If they do not all fit into the feature length, the
first k that fit are kept, as in the authors' `evaluate.py` (`few_shot.join_prompt`). With T5's
vocabulary, 81 % of the test prompts keep all five questions at 1024 tokens, and 97 % (all but 404)
at 2048 tokens. The longest question has 1092 tokens without any worked examples. The newlines in
the authors' prompts become spaces, because T5's vocabulary has no newline.

`accuracy` is the percentage of exactly correct letters in each subject, averaged over subjects of
equal weight. Greedy decoding may write something else than a letter. The authors compare only the
probabilities of A to D, as `EvalConfig.decoding = "likeliest"` does. The splits are `test` (14,042
questions) and `validation` (1,531 questions). The questions of the subjects alternate in the
dataset, so that the first N examples come from all subjects.
"""

from collections.abc import Sequence
import csv
import functools
import os

import tensorflow as tf

from gkd_jax.tasks import features, few_shot, folder
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
    """Returns the prompt and the questions of a subject.

    Args:
        data_dir: the folder with dev/ and the split's folder.
        subject: one of `SUBJECTS`.
        split: one of `SPLITS`.

    Raises:
        FileNotFoundError: if a file is missing; the message names the file and the folder.
        ValueError: if a file is not as expected; the message names the file and the line.
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
    """Returns the text of each question with its options, and the letter of the answer."""
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


def _dataset(split: str, subjects: Sequence[str]) -> tf.data.Dataset:
    data_dir = folder.family_folder("mmlu", "mmlu", "dev")
    return few_shot.group_dataset([read_subject(data_dir, subject, split) for subject in subjects])


def _register(name: str, subjects: Sequence[str]) -> None:
    """Registers a task that is made of some of the subjects."""
    features.register(
        name,
        source=features.Table(functools.partial(_dataset, subjects=subjects), SPLITS),
        tokenize=few_shot.TOKENIZE,
        metric_fns=[text_metrics.grouped_exact_match],
        postprocess_fn=few_shot.with_group,
    )


_register("mmlu", SUBJECTS)
for _subject in SUBJECTS:
    _register(f"mmlu_{_subject}", (_subject,))
