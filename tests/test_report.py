"""The report of made-up runs: its numbers, its gaps, and that nothing in it is executed."""

import html.parser
import itertools
import json
import math
import pathlib
import re
import shutil
import statistics
import struct

import pytest

from gkd_jax import report
from gkd_jax.report import archive, charts, paper, plots, results, runs, tables
from gkd_jax.report.record import Setting


PARAMETERS = {"small": 77_000_000, "base": 250_000_000, "large": 800_000_000, "xl": 3_000_000_000}
GREEDY = Setting("greedy", None, "validation")
ACCURACY = {0: 60.0, 1: 62.0, 2: 67.0}


def method(divergence=None, beta=None, fraction=0.0, **others):
    return {"divergence": divergence, "beta": beta, "on_policy_fraction": fraction, **others}


def write_run(
    folder: pathlib.Path,
    about: dict,
    final: dict[str, dict[str, float]],
    *,
    size: str = "small",
    teacher: str | None = "xl",
    seed: int = 0,
    steps: int = 20,
    train_steps: int = 20,
    task: str | None = None,
    num_examples: int | None = None,
    checkpoint: str | None = None,
    rows: dict[int, list[dict]] | None = None,
    learning_rate: float = 1e-3,
) -> pathlib.Path:
    """A run folder as `gkd-jax train` leaves it; `final` is task -> metrics of the last step."""

    def model(name):
        return name and {"parameters": PARAMETERS[name], "size": name, "checkpoint": None}

    folder.mkdir(parents=True)
    first = next(iter(final), task)
    run = {
        "name": folder.name,
        "method": about,
        "student": {**model(size), "checkpoint": checkpoint},
        "teacher": model(teacher),
        "data": {
            "task": task or first,
            "num_examples": num_examples,
            "batch_size": 32,
            "eval_task": first,
            "eval_split": "validation",
            "eval_decoding": "greedy",
        },
        "train_steps": train_steps,
        "seed": seed,
        "commit": "0123456789abcdef",
    }
    (folder / "run.json").write_text(json.dumps(run))
    lines = [
        {
            "step": step,
            "train/loss": 2 / step,
            "train/divergence": 2 / step,
            "train/on_policy": float(step % 2),
            "train/grad_norm": 1.0,
            "train/learning_rate": learning_rate * (1 - step / (2 * steps)),
            "train/sample_length": 12.0,
            "time/sample_s": 0.1,
            "time/update_s": 0.05,
        }
        for step in range(1, steps + 1)
    ]
    for share in (0.5, 1.0):
        values = {
            f"eval/{name}/{metric}": value * share
            for name, metrics in final.items()
            for metric, value in metrics.items()
        }
        lines.append({"step": round(steps * share), **values})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, decoded in (rows or {}).items():
        path = folder / "eval" / first / f"{step}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in decoded))
    return folder


def write_study(root: pathlib.Path) -> None:
    """SFT and on-policy GKD of one size, GKD with three seeds."""
    write_run(root / "sft", method(), {"arithmetic": {"accuracy": 40.0}}, teacher=None)
    for seed, value in ACCURACY.items():
        metrics = {"accuracy": value, "teacher_divergence": 0.1}
        write_run(
            root / f"gkd{seed}",
            method("jsd", 0.1, 1.0),
            {"arithmetic": metrics},
            seed=seed,
        )


def read_study(*roots: pathlib.Path) -> results.Study:
    return results.Study(runs.find([str(root) for root in roots]))


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def page(path: pathlib.Path) -> Page:
    return Page(path.read_text())


#### Numbers #######################################################################################


def test_means_and_standard_errors_are_those_computed_by_hand(tmp_path):
    write_study(tmp_path)
    table = tables.main_table(read_study(tmp_path), "arithmetic")
    # Mean 63; deviations -3, -1, 4: variance 26 / 2 = 13; error sqrt(13 / 3) = 2.0817.
    assert table.headings == ["method", "decoding", "small (77M)"]
    rows = {row[0].text: row[2] for row in table.rows}
    assert rows["On-policy GKD, JSD(0.1)"].text == "63.00 ± 2.08"
    assert rows["On-policy GKD, JSD(0.1)"].note == "n = 3"
    assert rows["On-policy GKD, JSD(0.1)"].best
    assert rows["SFT"].text == "40.00"
    assert not rows["SFT"].best


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0], [3.5, -1.0, 0.25, 7.0]])
def test_cell_against_the_definition(values):
    cell = results.cell(values)
    assert cell is not None
    mean = sum(values) / len(values)
    assert cell.mean == pytest.approx(mean)
    assert cell.n == len(values)
    if len(values) == 1:
        assert cell.error is None
    else:
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        assert cell.error == pytest.approx(math.sqrt(variance / len(values)))


def test_gain_is_over_the_sft_students_of_the_same_size(tmp_path):
    write_study(tmp_path)
    for name, about, value in (("sft", method(), 50.0), ("gkd", method("jsd", 0.1, 1.0), 70.0)):
        metrics = {"arithmetic": {"accuracy": value}}
        write_run(tmp_path / f"{name}_base", about, metrics, size="base")
    study = read_study(tmp_path)
    gains = {
        group.first.student.size: study.gain(group, "arithmetic", GREEDY, "accuracy")
        for group in study.groups
        if group.kind == "distillation"
    }
    assert {size: gain and gain.mean for size, gain in gains.items()} == {
        "small": pytest.approx(statistics.fmean(ACCURACY.values()) - 40.0),
        "base": pytest.approx(20.0),
    }


def test_gain_is_over_the_checkpoint_a_student_started_from(tmp_path):
    """Two SFT runs of one size: run.json says which of them it was."""
    for steps, value in ((20, 40.0), (10, 30.0)):
        write_run(
            tmp_path / f"sft{steps}",
            method(),
            {"arithmetic": {"accuracy": value}},
            teacher=None,
            steps=steps,
            train_steps=steps,
        )
    for name in ("sft10", "sft20"):
        write_run(
            tmp_path / f"from_{name}",
            method("reverse_kl", None, 1.0 if name == "sft10" else 0.5),
            {"arithmetic": {"accuracy": 45.0}},
            checkpoint=str(tmp_path / name),
        )
    study = read_study(tmp_path)
    gains = {
        group.first.name: study.gain(group, "arithmetic", GREEDY, "accuracy")
        for group in study.groups
        if group.kind == "distillation"
    }
    assert {name: gain and gain.mean for name, gain in gains.items()} == {
        "from_sft10": 15.0,
        "from_sft20": 5.0,
    }


def test_configurations_of_one_label_are_told_apart(tmp_path):
    write_study(tmp_path)
    metrics = {"arithmetic": {"accuracy": 50.0}}
    write_run(tmp_path / "less", method("jsd", 0.1, 1.0), metrics, num_examples=1000)
    labels = {row[0].text for row in tables.main_table(read_study(tmp_path), "arithmetic").rows}
    assert labels == {
        "SFT",
        "On-policy GKD, JSD(0.1) · all examples",
        "On-policy GKD, JSD(0.1) · 1,000 examples",
    }


def test_learning_rates_are_told_apart(tmp_path):
    for name, rate in (("low", 1e-3), ("high", 0.03)):
        metrics = {"arithmetic": {"accuracy": 50.0}}
        write_run(tmp_path / name, method(), metrics, teacher=None, steps=100, learning_rate=rate)
    study = read_study(tmp_path)
    assert not study.left_out
    labels = {row[0].text for row in tables.main_table(study, "arithmetic").rows}
    assert labels == {"SFT · learning rate 0.03", "SFT · learning rate 0.001"}


@pytest.mark.parametrize(
    ("about", "name"),
    [
        (method(), "SFT"),
        (method("forward_kl", None, 0.0), "Supervised KD"),
        (method("forward_kl", None, 0.5), "ImitKD"),
        (method("total_variation", None, 0.5), "f-distill"),
        (method("forward_kl", None, 1.0), "On-policy GKD, FKL"),
        (method("jsd", 0.9, 0.5), "Mixed GKD, JSD(0.9)"),
        (method("reverse_kl", None, 0.25), "GKD, RKL, λ = 0.25"),
        (method("reverse_kl", None, "linear"), "GKD, RKL, λ by linear"),
        (method("jsd", 0.9, 1.0, rl_alpha=0.1, reward="rouge2"), "RL + GKD, JSD(0.9)"),
        (method("jsd", 0.9, 1.0, label="ours"), "ours"),
    ],
)
def test_methods_have_the_papers_names(tmp_path, about, name):
    write_run(tmp_path / "run", about, {"arithmetic": {"accuracy": 50.0}})
    (run,) = runs.find([str(tmp_path)])
    assert run.label == name


def test_seqkd_is_told_from_sft_by_name(tmp_path):
    metrics = {"arithmetic": {"accuracy": 50.0}}
    write_run(tmp_path / "a", method(), metrics, task="/data/seqkd_data/outputs.jsonl")
    write_run(tmp_path / "b", method(), metrics)
    assert [run.label for run in runs.find([str(tmp_path)])] == ["SeqKD", "SFT"]


#### What is missing or damaged ####################################################################


def test_a_missing_run_is_an_empty_cell(tmp_path):
    write_study(tmp_path)
    metrics = {"arithmetic": {"accuracy": 70.0}}
    write_run(tmp_path / "base", method("reverse_kl", None, 1.0), metrics, size="base")
    report.write([str(tmp_path)], str(tmp_path / "out"))
    table = tables.main_table(read_study(tmp_path), "arithmetic")
    assert table.headings[2:] == ["small (77M)", "base (250M)"]
    cells = {row[0].text: [entry.text for entry in row[2:]] for row in table.rows}
    assert cells["SFT"] == ["40.00", ""]
    assert cells["On-policy GKD, RKL"] == ["", "70.00"]
    assert "| SFT | greedy, validation | 40.00 (n = 1) |  |" in (
        (tmp_path / "out" / "report.md").read_text()
    )


def test_a_run_without_evaluations_has_a_row(tmp_path):
    write_run(tmp_path / "new", method("jsd", 0.5, 1.0), {}, task="arithmetic")
    report.write([str(tmp_path)], str(tmp_path / "out"))
    (row,) = tables.main_table(read_study(tmp_path), "arithmetic").rows
    assert [entry.text for entry in row][::2] == ["On-policy GKD, JSD(0.5)", ""]
    assert not list((tmp_path / "out" / "figures").iterdir())


def test_damaged_files_are_left_out_and_named(tmp_path):
    write_study(tmp_path)
    path = tmp_path / "gkd0" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    damaged = ['{"step": 7, "train/lo', "[1, 2]", '{"train/loss": 3}', '{"step": "x"}', ""]
    last = lines.pop()
    nan = json.dumps({"step": 20, "eval/arithmetic/accuracy": math.nan, "train/loss": True})
    path.write_text("\n".join([*lines[:3], *damaged, *lines[3:], last, nan]))
    (tmp_path / "gkd1" / "run.json").write_text('{"method": ')
    (tmp_path / "gkd2" / "run.json").write_text('{"method": [], "student": 3, "data": "x"}')
    (tmp_path / "gkd2" / "evals" / "t1").mkdir(parents=True)
    (tmp_path / "gkd2" / "evals" / "t1" / "metrics.json").write_text("[]")
    report.write([str(tmp_path)], str(tmp_path / "out"))
    found = {run.name: run for run in runs.find([str(tmp_path)])}
    assert found["gkd0"].problems == ("metrics.jsonl: 4 damaged lines left out",)
    assert found["gkd0"].final("arithmetic", GREEDY)["accuracy"] == ACCURACY[0]
    assert found["gkd0"].curve("train/loss")[:2] == [(1, 2.0), (2, 1.0)]
    assert found["gkd1"].problems == ("run.json cannot be read",)
    assert found["gkd1"].label == "gkd1"
    assert found["gkd2"].problems == ("evals/t1/metrics.json cannot be read",)
    assert (tmp_path / "out" / "runs" / "gkd1.html").exists()


def test_unfinished_and_repeated_runs_are_in_no_mean(tmp_path):
    write_study(tmp_path)
    metrics = {"arithmetic": {"accuracy": 1.0}}
    about = method("jsd", 0.1, 1.0)
    write_run(tmp_path / "short", about, metrics, seed=7, steps=10)
    write_run(tmp_path / "twice", about, metrics, seed=0)
    study = read_study(tmp_path)
    assert {run.name: reason for run, reason in study.left_out} == {
        "short": "unfinished: step 10 of 20",
        "twice": "same configuration and seed as gkd0",
    }
    (gkd,) = [group for group in study.groups if group.kind == "distillation"]
    assert gkd.cell("arithmetic", GREEDY, "accuracy") == results.cell(list(ACCURACY.values()))


def test_folders_that_cannot_be_a_report_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"RUN_DIR .*nowhere"):
        report.write([str(tmp_path / "nowhere")], str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl below"):
        report.write([str(tmp_path)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_names_stay_unique(tmp_path):
    for root in ("a", "b"):
        write_run(tmp_path / root / "g_kd", method(), {"arithmetic": {"accuracy": 1.0}})
        write_run(tmp_path / root / "g kd", method(), {"arithmetic": {"accuracy": 1.0}})
    (tmp_path / "a" / "g_kd" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "a" / "g_kd" / "checkpoints" / "1" / "metrics.jsonl").write_text("")
    found = runs.find([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a" / "g_kd")])
    assert sorted(run.name for run in found) == ["a/g kd", "a/g_kd", "b/g kd", "b/g_kd"]
    assert len({run.slug for run in found}) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", run.slug) for run in found)


#### The paper #####################################################################################


@pytest.mark.parametrize(
    ("cell", "value", "figure"),
    [
        (("xsum", "rouge2", "greedy", "small", "sft", 0.0), 13.45, "Fig. 1"),
        (("xsum", "rouge2", "greedy", "base", "forward_kl", 1.0), 18.84, "Fig. 1"),
        (("xsum", "rouge2", "sample", "large", "total_variation", 0.5), 19.46, "Fig. 2"),
        (("xsum", "rouge2", "sample", "base", "forward_kl", 0.0), 16.7, "Fig. A.12"),
        (("xsum", "rouge2", "greedy", "small", "jsd(0.5)", 0.5), 16.2, "Fig. A.13"),
        (("wmt_t2t_ende_v003", "bleu", "beam", "small", "jsd(0.1)", 1.0), 26.43, "Fig. 1"),
        (("wmt_t2t_ende_v003", "bleu", "beam", "base", "reverse_kl", 0.5), 27.32, "Fig. 6"),
        (
            ("wmt_t2t_ende_v003", "bleu", "beam", "base", "total_variation", 0.5),
            27.275,
            "Fig. A.15",
        ),
        (("gsm8k", "accuracy", "greedy", "xl", "sft", 0.0), 27.9, "Fig. 1"),
        (("gsm8k_cot", "accuracy_with_calculator", None, "small", "seqkd", 0.0), 7.88, "Fig. 1"),
        (("gsm8k", "accuracy", "greedy", "small", "reverse_kl", 0.9), 9.44, "Fig. 8"),
        (("gsm8k", "accuracy", "greedy", "base", "jsd(0.9)", 0.5), 16.06, "Fig. 7"),
        (("gsm8k", "accuracy", "greedy", "large", "jsd(0.5)", 1.0), 26.2, "Fig. A.14"),
        (("gsm8k", "accuracy", "greedy", "large", "forward_kl", 0.5), 26.2, "Fig. 9"),
        (("mmlu", "accuracy", "greedy", "base", "reverse_kl", 1.0), 37.57, "Fig. A.11"),
        (
            ("bbh_direct", "accuracy_23_tasks", "greedy", "base", "forward_kl", 0.0),
            31.74,
            "Fig. A.11",
        ),
    ],
)
def test_the_papers_numbers(cell, value, figure):
    task, metric, decoding, size, name, fraction = cell
    number = paper.find(
        task=task,
        metric=metric,
        decoding=decoding,
        size=size,
        method=name,
        on_policy_fraction=fraction,
    )
    assert number is not None
    assert (number.figure, number.value) == (figure, pytest.approx(value))


@pytest.mark.parametrize(
    ("task", "metric", "decoding", "size"),
    [
        ("xsum", "rouge1", "greedy", "small"),
        ("xsum", "rouge2", "beam", "small"),
        ("xsum", "rouge2", "greedy", "tiny"),
        ("xsum", "rouge2", "greedy", None),
        ("arithmetic", "accuracy", "greedy", "small"),
        ("wmt_t2t_deen_v003", "bleu", "beam", "small"),
        ("mmlu_anatomy", "accuracy", "greedy", "base"),
        ("bbh_cot", "accuracy_23_tasks", "greedy", "base"),
    ],
)
def test_other_cells_are_not_the_papers(task, metric, decoding, size):
    cell = {"task": task, "metric": metric, "decoding": decoding, "size": size}
    assert paper.find(**cell, method="forward_kl", on_policy_fraction=0.0) is None


def test_self_distillation_has_numbers_of_its_own():
    cell = {"task": "gsm8k", "metric": "accuracy", "decoding": "greedy", "size": "large"}
    cell |= {"method": "jsd(0.9)", "on_policy_fraction": 1.0}
    ours, other = paper.find(**cell, self_distilled=True), paper.find(**cell)
    assert (ours and ours.value, other and other.value) == (26.16, 27.0)


def test_relations_that_the_text_of_the_paper_states():
    """Numbers of different figures that must agree, so that a slip in either shows."""
    for number in paper.NUMBERS:
        if number.figure == "Fig. A.13" and number.on_policy_fraction == 0.5:
            continue
        if number.figure in ("Fig. A.13", "Fig. 6", "Fig. 7", "Fig. A.14"):
            (same,) = [
                other
                for other in paper.NUMBERS
                if other[1:6] == number[1:6] and other.figure == "Fig. 1"
            ] or [number]
            assert number.value == pytest.approx(same.value, abs=0.25)
    # "53 % higher over ImitKD and 162 % over f-distill, averaged across small and base".
    gains = {
        (n.method, n.on_policy_fraction, n.size): n.gain
        for n in paper.NUMBERS
        if n.figure == "Fig. A.15"
    }
    for other, ratio in (("forward_kl", 1.53), ("total_variation", 2.62)):
        ratios = [gains["jsd(0.1)", 1.0, s] / gains[other, 0.5, s] for s in ("small", "base")]
        assert statistics.fmean(ratios) == pytest.approx(ratio, abs=0.01)


def test_the_papers_number_stands_beside_ours(tmp_path):
    metrics = {"xsum": {"rouge1": 30.0, "rouge2": 16.0, "rougeLsum": 25.0}}
    write_run(tmp_path / "gkd", method("forward_kl", None, 1.0), metrics)
    write_run(tmp_path / "part", method("forward_kl", None, 0.0), metrics, num_examples=1000)
    report.write([str(tmp_path)], str(tmp_path / "out"))
    notes = {
        row[0].text: row[2].note for row in tables.main_table(read_study(tmp_path), "xsum").rows
    }
    assert notes == {
        "On-policy GKD, FKL": "n = 1; paper 16.34, Fig. 1, greedy",
        "Supervised KD": "n = 1",
    }
    assert "paper 16.34, Fig. 1, greedy" in page(tmp_path / "out" / "report.html").text


#### Pages #########################################################################################


def test_everything_a_run_holds_is_text(tmp_path):
    evil = "<script>alert('x')</script><img src=x onerror=y>|`*[a](b)"
    rows = [
        {
            "inputs": evil,
            "targets": evil,
            "prediction": evil,
            "tokens": ["▁<script>", "a", "</s>"],
            "token_divergence": [0.5, None, 0.1],
        }
    ]
    about = method("jsd", 0.1, 1.0, label=evil)
    write_run(
        tmp_path / "a&b" / "<b>run",
        about,
        {"<u>task": {"accuracy": 1.0, "<s>m": 2.0}},
        rows={10: [{"inputs": evil, "targets": evil, "prediction": evil}], 20: rows},
    )
    write_run(tmp_path / "other", method(), {"<u>task": {"accuracy": 3.0}}, teacher=None)
    report.write([str(tmp_path)], str(tmp_path / "out"))
    files = sorted((tmp_path / "out").rglob("*.html"))
    assert len(files) == 3
    for path in files:
        parsed = page(path)
        assert not {tag for tag, _ in parsed.tags} & {"script", "iframe", "u"}
        assert not [
            attributes
            for _, attributes in parsed.tags
            if any(name.startswith("on") for name in attributes)
        ]
        assert not parsed.open
    (run_page,) = [page(path) for path in files if "run" in path.name]
    # Prompt, reference and the student before it was trained; after, token by token.
    assert run_page.text.count(evil) >= 4
    assert "<script>a ■" in run_page.text
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert "<u>" not in markdown


def test_nothing_is_fetched(tmp_path):
    write_study(tmp_path)
    report.write([str(tmp_path)], str(tmp_path / "out"))
    for path in (tmp_path / "out").rglob("*.html"):
        for tag, attributes in page(path).tags:
            source = attributes.get("src")
            assert source is None or source.startswith("data:image/png;base64,"), (tag, source)
            target = attributes.get("href")
            if target is not None:
                assert (path.parent / target).exists()
        assert "url(" not in path.read_text()
        assert "@import" not in path.read_text()


def test_tokens_are_shaded_by_their_divergence(tmp_path):
    tokens = [f"▁t{index}" for index in range(20)]
    divergence = [index / 19 for index in range(20)]
    row = {"inputs": "p", "targets": "r", "prediction": "x"}
    shaded = {**row, "tokens": tokens, "token_divergence": divergence}
    broken = {**row, "prediction": "kept", "tokens": tokens, "token_divergence": [0.1]}
    write_run(
        tmp_path / "run",
        method("jsd", 0.1, 1.0),
        {"arithmetic": {"accuracy": 1.0}},
        rows={20: [shaded, broken]},
    )
    report.write([str(tmp_path)], str(tmp_path / "out"))
    parsed = page(tmp_path / "out" / "runs" / "run.html")
    styles = [a["style"] for tag, a in parsed.tags if tag == "span" and "title" in a]
    depths = [float(re.search(r",([\d.]+)\)$", style)[1]) for style in styles]
    assert len(depths) == 20
    assert depths == sorted(depths)
    assert depths[0] == 0
    # The 95th percentile is darkest, and what lies beyond it no darker.
    assert depths[-2] == depths[-1] == 0.75
    assert depths[9] == pytest.approx(0.75 * 9 / 18, abs=0.006)
    assert "kept" in parsed.text
    assert "divergence from the teacher" in parsed.text


def test_before_and_after_are_of_the_same_prompt(tmp_path):
    def row(prompt, prediction):
        return {"inputs": prompt, "targets": "r", "prediction": prediction}

    write_run(
        tmp_path / "run",
        method(),
        {"arithmetic": {"accuracy": 1.0}},
        rows={
            10: [row("p2", "old2"), row("p1", "old1")],
            20: [row("p1", "new1"), row("p3", "new3")],
        },
    )
    report.write([str(tmp_path)], str(tmp_path / "out"))
    text = page(tmp_path / "out" / "runs" / "run.html").text
    assert re.search(r"p1.*r.*old1.*new1.*p3.*r.*new3", text, re.DOTALL)
    assert "old2" not in text


def test_ticks_are_round_and_inside():
    for low, high in ((0.0, 1.0), (-3.0, 4.0), (0.00012, 0.00019), (24.8, 98.0), (0.0, 123456.0)):
        ticks = charts.ticks_of(low, high)
        assert 2 <= len(ticks) <= 7
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
        gaps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in itertools.pairwise(ticks)}
        assert gaps == {1.0}


#### Figures #######################################################################################


def png_size(path: pathlib.Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def write_everything(root: pathlib.Path, sizes=("small", "base"), seeds=(0, 1), task="arithmetic"):
    """Every experiment of the paper, small; a few runs are missing."""
    divergences = [("forward_kl", None), ("jsd", 0.1), ("jsd", 0.9), ("reverse_kl", None)]
    count = 0

    def run(about, value, *, metrics=None, **options):
        nonlocal count
        count += 1
        final = {options.pop("on", task): {"accuracy": value, **(metrics or {})}}
        return write_run(root / f"run{count}", about, final, **options)

    run(method(), 80.0, size="xl", teacher=None)
    for place, size in enumerate(sizes):
        start = 30.0 + 10 * place
        run(method(), start, size=size, teacher=None)
        for seed in seeds:
            for index, (name, beta) in enumerate(divergences):
                for fraction in (0.0, 0.5, 1.0):
                    if (name, fraction, size) == ("reverse_kl", 0.5, "base"):
                        continue
                    value = start + 8 + 12 * fraction - index + 1.3 * seed
                    folder = run(method(name, beta, fraction), value, size=size, seed=seed)
                    for temperature in (0.5, 1.0) if fraction == 1 else ():
                        diversity = {"accuracy": value - 9 * temperature}
                        diversity["self_bleu"] = 90 - 50 * temperature + 4 * index
                        path = folder / "evals" / f"t{temperature}" / "metrics.json"
                        path.parent.mkdir(parents=True)
                        path.write_text(json.dumps({task: diversity}))
            run(method("total_variation", None, 0.5), start + 13, size=size, seed=seed)
            for amount in (1000, 10000):
                value = start + math.log10(amount) * 3 + seed
                about = method("jsd", 0.1, 1.0)
                run(about, value, size=size, seed=seed, num_examples=amount)
            for alpha in (0.05, 0.25):
                about = method("jsd", 0.9, 1.0, rl_alpha=alpha, reward="Entailment")
                extra = {"entailment": 90 - 100 * alpha}
                run(about, start + 20 * alpha, size=size, seed=seed, metrics=extra)
            for name, beta, fraction in (("forward_kl", None, 0.0), ("jsd", 0.9, 1.0)):
                run(method(name, beta, fraction), 82.0 + seed, size="xl", seed=seed)
    for on in ("mmlu", "bbh_direct"):
        run(method(), 35.0, on=on, size="base", teacher=None)
        for name, value in (("forward_kl", 34.5), ("reverse_kl", 37.0)):
            run(method(name, None, 1.0), value, on=on, size="base")


def test_every_figure_of_the_paper_is_drawn(tmp_path):
    write_everything(tmp_path / "runs", sizes=("small",), seeds=(0, 1))
    report.write([str(tmp_path / "runs")], str(tmp_path / "out"))
    figures = {path.name: path for path in (tmp_path / "out" / "figures").iterdir()}
    assert {
        "arithmetic_methods.png",
        "arithmetic_divergence_lambda.png",
        "arithmetic_lambda.png",
        "arithmetic_data.png",
        "arithmetic_quality_diversity.png",
        "arithmetic_rl_alpha.png",
        "arithmetic_self_distillation.png",
        "bbh_direct_instructions.png",
    } <= set(figures)
    for path in figures.values():
        width, height = png_size(path)
        assert width > 400
        assert height > 200
        # A blank picture of this size takes less.
        assert path.stat().st_size > 8000
    parsed = page(tmp_path / "out" / "report.html")
    assert sum(tag == "img" for tag, _ in parsed.tags) == len(figures)
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert set(re.findall(r"\(figures/(.*?)\)", markdown)) == set(figures)


def test_one_run_makes_no_figure(tmp_path):
    metrics = {"arithmetic": {"accuracy": 1.0, "entailment": 2.0}}
    write_run(tmp_path / "run", method("jsd", 0.9, 1.0, rl_alpha=0.5), metrics)
    report.write([str(tmp_path)], str(tmp_path / "out"))
    assert not list((tmp_path / "out" / "figures").iterdir())


def test_labels_are_not_read_as_formulas(tmp_path):
    for name, divergence in (("$\\x{$", "forward_kl"), ("日本", "reverse_kl")):
        about = method(divergence, None, 1.0, label=name)
        write_run(tmp_path / divergence, about, {"arithmetic": {"accuracy": 1.0}})
    report.write([str(tmp_path)], str(tmp_path / "out"))
    assert (tmp_path / "out" / "figures" / "arithmetic_methods.png").exists()


def test_evaluations_written_elsewhere_find_their_run(tmp_path):
    """`gkd-jax eval` of a sweep writes beside the runs; its metrics.json names the checkpoint."""
    run = write_run(tmp_path / "run", method(), {"arithmetic": {"accuracy": 1.0}}, teacher=None)
    for temperature, value in ((0.5, 3.0), (1.0, 2.0)):
        content = {
            "arithmetic": {"accuracy": value, "self_bleu": 50.0},
            "evaluation": {
                "checkpoint": str(run),
                "decoding": "sample",
                "temperature": temperature,
                "split": "test",
            },
        }
        folder = tmp_path / f"decoded{temperature}"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(content))
    (found,) = runs.find([str(tmp_path)])
    assert found.final("arithmetic", Setting("sample", 0.5, "test"))["accuracy"] == 3.0
    assert found.final("arithmetic", Setting("sample", 1.0, "test"))["accuracy"] == 2.0
    assert found.final("arithmetic", GREEDY)["accuracy"] == 1.0


def test_figures_show_the_groups_and_leave_gaps(tmp_path, monkeypatch):
    """What the drawing functions are given: bars of one size, a map with an empty cell."""
    drawn = {}
    for name in ("bars", "heat_maps"):

        def draw(panels, *, name=name, original=getattr(plots, name), **options):
            drawn.setdefault(name, []).append(panels)
            return original(panels, **options)

        monkeypatch.setattr(plots, name, draw)
    write_run(tmp_path / "sft", method(), {"gsm8k": {"accuracy": 5.0}}, teacher=None)
    write_run(tmp_path / "big", method(), {"gsm8k": {"accuracy": 30.0}}, size="xl", teacher=None)
    cells = {("forward_kl", 1.0): 11.0, ("forward_kl", 0.0): 7.0, ("reverse_kl", 1.0): 4.0}
    for (name, fraction), value in cells.items():
        about = method(name, None, fraction)
        write_run(tmp_path / f"{name}{fraction}", about, {"gsm8k": {"accuracy": value}})
    rl = method("jsd", 0.9, 1.0, rl_alpha=0.5)
    write_run(tmp_path / "rl", rl, {"gsm8k": {"accuracy": 9.0}})
    alike = {"gsm8k": {"accuracy": 33.0}}
    write_run(tmp_path / "self", method("forward_kl", None, 1.0), alike, size="xl")
    report.write([str(tmp_path)], str(tmp_path / "out"))

    ((panel,),) = drawn["bars"]
    assert panel.reference == ("teacher", 30.0)
    assert [(bar.label, bar.cell.mean, bar.note, bar.paper) for bar in panel.bars] == [
        ("SFT", 5.0, "", 4.58),
        ("Supervised KD", 7.0, "+2.0", 7.08),
        ("On-policy GKD, FKL", 11.0, "+6.0", 11.18),
        ("On-policy GKD, RKL", 4.0, "-1.0", pytest.approx(10.08, abs=0.06)),
    ]
    (((ours,), (printed,)),) = drawn["heat_maps"]
    assert (ours.rows, ours.columns) == (["λ 100%", "λ 0%"], ["FKL", "RKL"])
    assert [[cell and cell.mean for cell in row] for row in ours.cells] == [
        [6.0, -1.0],
        [2.0, None],
    ]
    assert printed.title == "small, the paper (Fig. 7)"
    assert [cell.mean for cell in printed.cells[0]] == [6.6, 4.7, 3.8, 4.9, 5.5]


def test_fig_3_and_5_of_the_paper_stand_beside_xsum(tmp_path, monkeypatch):
    panels = []
    original = plots.curves
    monkeypatch.setattr(
        plots, "curves", lambda given, **options: panels.append(given) or original(given, **options)
    )
    for amount in (1000, 10000, None):
        about = method("jsd", 0.1, 1.0)
        write_run(tmp_path / f"n{amount}", about, {"xsum": {"rouge2": 12.0}}, num_examples=amount)
    for alpha in (0.1, 0.5):
        about = method("jsd", 0.9, 1.0, rl_alpha=alpha)
        metrics = {"rouge2": 12.0 + alpha, "entailment": 50.0}
        write_run(tmp_path / f"a{alpha}", about, {"xsum": metrics}, size="base")
    # Fig. 3 is of samples: runs that do not say how they decoded stand beside it, greedy ones not.
    for path in tmp_path.glob("n*/run.json"):
        content = json.loads(path.read_text())
        del content["data"]["eval_decoding"]
        path.write_text(json.dumps(content))
    report.write([str(tmp_path)], str(tmp_path / "out"))
    ((panel,),) = panels
    assert [label for _, label in panel.ticks] == ["1,000", "10,000", "all"]
    lines = {line.label: [y.mean for y in line.ys] for line in panel.lines}
    assert lines["On-policy GKD, JSD(0.1)"] == [12.0, 12.0, 12.0]
    assert lines["GKD (On-policy), the paper"] == [12.40, 12.91, 15.13]
    assert "alpha 0.1 +4.06 and +33.2" in (tmp_path / "out" / "report.md").read_text()


def test_an_archive_makes_the_same_report_and_holds_no_paths(tmp_path):
    study = tmp_path / "study"
    write_study(study)
    about = {"divergence": "forward_kl", "on_policy_fraction": 1.0}
    started = write_run(
        study / "started", about, {"arithmetic": {"accuracy": 50.0}}, checkpoint=f"{study}/sft"
    )
    write_run(study / "unfinished", about, {}, task="arithmetic", train_steps=40)
    evaluated = started / "evals" / "sample"
    evaluated.mkdir(parents=True)
    values = {"decoding": "sample", "temperature": 1.0, "split": "validation"}
    content = {
        "arithmetic": {"accuracy": 33.0},
        "evaluation": {"checkpoint": str(started), **values},
    }
    (evaluated / "metrics.json").write_text(json.dumps(content))
    (study / "beams").mkdir()  # as a sweep's row of `eval` leaves it
    elsewhere = {"checkpoint": str(started), "decoding": "beam", "split": "validation"}
    content = {"arithmetic": {"accuracy": 44.0}, "evaluation": elsewhere}
    (study / "beams" / "metrics.json").write_text(json.dumps(content))
    kept = tmp_path / "kept"
    archive.write([str(study)], str(kept))
    names = sorted(path.name for path in kept.iterdir())
    assert names == ["gkd0", "gkd1", "gkd2", "sft", "started"]
    texts = [path.read_text() for path in kept.rglob("*") if path.is_file()]
    assert not any(str(tmp_path) in text for text in texts)
    assert sum(map(len, texts)) < 20_000
    shutil.rmtree(study / "unfinished")
    for root in (study, kept):
        report.write([str(root)], str(tmp_path / f"report_{root.name}"))
    first, second = (tmp_path / f"report_{name}" / "report.md" for name in ("study", "kept"))
    assert first.read_text() == second.read_text()
    assert "33.00" in second.read_text()
    assert "44.00" in second.read_text()


def test_the_grid_of_divergence_and_lambda_is_of_samples_at_temperature_1(tmp_path):
    for temperature in (0.5, 1.0):
        about = method("jsd", 0.1, 1.0, sampling_temperature=temperature)
        write_run(tmp_path / f"{temperature}", about, {"arithmetic": {"accuracy": 50.0}})
    study = read_study(tmp_path)
    assert len(study.groups) == 2
    assert [group.first.name for group in results.grid(study.groups)] == ["1.0"]


def test_runs_whose_samples_were_one_step_old_are_told_apart(tmp_path):
    about = {"divergence": "forward_kl", "on_policy_fraction": 1.0}
    for seed, (name, ahead) in enumerate([("old", None), ("fresh", False), ("ahead", True)]):
        method = about if ahead is None else {**about, "sample_ahead": ahead}
        write_run(tmp_path / name, method, {"arithmetic": {"accuracy": 50.0}}, seed=seed)
    study = results.Study(runs.find([str(tmp_path)]))
    found = {group.label: [run.name for run in group.runs] for group in study.groups}
    assert found == {
        "On-policy GKD, FKL · sample ahead False": ["fresh", "old"],
        "On-policy GKD, FKL · sample ahead True": ["ahead"],
    }
    assert [group.on_grid for group in study.groups] == [True, False]


def test_an_archive_of_runs_of_one_name_leaves_them_alone_and_cuts_paths(tmp_path):
    about = {"divergence": "forward_kl", "on_policy_fraction": 1.0}
    for name, seed in (("x/a/run", 0), ("y/a/run", 1)):
        write_run(tmp_path / name, about, {"/data/x.jsonl": {"bleu": 1.0}}, seed=seed)
    roots = [tmp_path / "x" / "a", tmp_path / "y" / "a"]
    before = [path.read_text() for root in roots for path in sorted(root.rglob("*.json*"))]
    archive.write([str(root) for root in roots], str(tmp_path / "kept"))
    assert before == [path.read_text() for root in roots for path in sorted(root.rglob("*.json*"))]
    kept = list((tmp_path / "kept").rglob("metrics.jsonl"))
    assert len(kept) == 2
    texts = [path.read_text() for path in (tmp_path / "kept").rglob("*.json*")]
    assert not any("/data/" in text for text in texts)
    assert "eval/x.jsonl/bleu" in kept[0].read_text()
