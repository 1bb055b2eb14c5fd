"""The report as HTML and Markdown, and one HTML page a run. Everything a run holds is escaped."""

import base64
from collections.abc import Sequence
import html
import pathlib

from gkd_jax.report import canvas, charts, paper, samples, tables
from gkd_jax.report.charts import Series
from gkd_jax.report.figures import Figure
from gkd_jax.report.record import Run
from gkd_jax.report.results import Study


_TITLE = "On-policy distillation"
# name of the chart -> (metric of metrics.jsonl, name of its curve).
_CURVES = {
    "gradient norm": (("train/grad_norm", "grad_norm"),),
    "learning rate": (("train/learning_rate", "learning_rate"),),
    "sampled length, tokens": (("train/sample_length", "length"),),
    "truncated samples, fraction": (("train/truncated_fraction", "truncated"),),
    "entropy of the samples, nats": (("train/sample_entropy", "entropy"),),
    "reward": (("train/reward", "reward"),),
    "seconds a step": (("time/sample_s", "sampling"), ("time/update_s", "update")),
}
_COLOURS = (canvas.ACCENT, canvas.WARM, canvas.GREY, canvas.MIDDLE)
_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #22262b; background: #fff;
  max-width: 1180px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem; }
a { color: #2b5c8a; } .note, small, figcaption { color: #5d656d; font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .7rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1.1rem .35rem 0;
  border-bottom: 1px solid #e4e6e9; font-variant-numeric: tabular-nums; }
th { font-size: .85rem; font-weight: 600; color: #5d656d; border-bottom-color: #b9bec4; }
td { white-space: nowrap; } td small { margin-left: .5rem; }
td small.below { display: block; margin: 0; white-space: normal; }
.runs td:nth-child(6) { white-space: normal; min-width: 16rem; }
figure { margin: 1.8rem 0; } figcaption { max-width: 50rem; margin-bottom: .4rem; }
figcaption b { color: #22262b; } figure img { max-width: 100%; height: auto; }
summary { cursor: pointer; color: #2b5c8a; font-size: .9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr));
  gap: 1.4rem 1.6rem; margin: 1rem 0; }
.chart { width: 100%; height: auto; }
.samples td { white-space: normal; min-width: 14rem; max-width: 26rem; }
.clip { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15rem; overflow-y: auto; }
.clip span { border-radius: 2px; }
.legend { font-size: .85rem; } .legend i { display: inline-block; width: 1.4rem; height: .8rem;
  border: 1px solid #e4e6e9; vertical-align: -1px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; font-size: .9rem; }
dt { color: #5d656d; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def report_html(study: Study, drawn: dict[str, list[Figure]], figures: pathlib.Path) -> str:
    """The whole report in one file, with the PNGs of the folder `figures` inside."""
    parts = [f"<h1>{_TITLE}</h1>", f"<p class='note'>{html.escape(_summary(study))}</p>"]
    for task in study.tasks():
        parts.append(f"<h2>{html.escape(task)}</h2>")
        parts.append(f"<p class='note'>{html.escape(_about_table(study, task))}</p>")
        parts.append(tables.to_html(tables.main_table(study, task)))
        if len(study.metrics(task)) > 1:
            inside = tables.to_html(tables.metrics_table(study, task))
            parts.append(f"<details><summary>All metrics</summary>{inside}</details>")
        for figure in drawn.get(task, ()):
            parts.append(_figure_html(figure, figures / figure.file))
    parts.append("<h2>Runs</h2>")
    parts.append(f"<div class='runs'>{tables.to_html(tables.runs_table(study))}</div>")
    return _page(_TITLE, parts)


def report_markdown(study: Study, drawn: dict[str, list[Figure]]) -> str:
    """The same, with links to figures/ and runs/."""
    plain = tables.plain_markdown
    parts = [f"# {_TITLE}", plain(_summary(study))]
    for task in study.tasks():
        parts += [f"## {plain(task)}", plain(_about_table(study, task))]
        parts.append(tables.to_markdown(tables.main_table(study, task)))
        if len(study.metrics(task)) > 1:
            inside = tables.to_markdown(tables.metrics_table(study, task))
            parts.append(f"<details><summary>All metrics</summary>\n\n{inside}\n\n</details>")
        for figure in drawn.get(task, ()):
            parts.append(f"**{plain(figure.title)}.** {plain(figure.caption)}")
            parts.append(f"![{plain(figure.title)}](figures/{figure.file})")
    parts += ["## Runs", tables.to_markdown(tables.runs_table(study))]
    return "\n\n".join(parts) + "\n"


def run_html(run: Run) -> str:
    """Curves, evaluations and samples of one run."""
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in _facts(run)
    )
    parts = [
        '<p class="note"><a href="../report.html">All runs</a></p>',
        f"<h1>{html.escape(run.name)}</h1>",
        f"<dl>{facts}</dl>",
        *(f"<p class='note'>{html.escape(problem)}</p>" for problem in run.problems),
    ]
    evaluations = list(_evaluation_charts(run))
    if evaluations:
        parts.append(f"<h2>Evaluations</h2><div class='charts'>{''.join(evaluations)}</div>")
    training = [_loss_chart(run), *_training_charts(run)]
    if any(training):
        parts.append(f"<h2>Training</h2><div class='charts'>{''.join(training)}</div>")
    parts += [samples.to_html(table) for table in samples.tables(run)]
    return _page(run.name, parts)


def _figure_html(figure: Figure, path: pathlib.Path) -> str:
    png = path.read_bytes()
    # Bytes 16 to 20 of a PNG are its width; the figures have two pixels for one of CSS.
    width = int.from_bytes(png[16:20], "big") * 96 // canvas.DOTS_PER_INCH
    return (
        f"<figure><figcaption><b>{html.escape(figure.title)}.</b> {html.escape(figure.caption)}"
        f'</figcaption><img alt="{html.escape(figure.title)}" width="{width}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
    )


def _summary(study: Study) -> str:
    seeds = {run.seed for run in study.runs if run.seed is not None}
    text = f"{_count(len(study.runs), 'run')}, {_count(len(study.groups), 'configuration')}"
    text += f", {_count(len(seeds), 'seed')}." if seeds else "."
    if study.left_out:
        text += (
            f" {_count(len(study.left_out), 'run')} left out of tables and figures (unfinished, or "
            "the same seed twice): see the list of runs."
        )
    return text


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _about_table(study: Study, task: str) -> str:
    metrics = study.metrics(task)
    if not metrics:
        return "No run has evaluated this task yet."
    text = f"{metrics[0]}: mean ± standard error over n seeds, by student size"
    if paper.task_of(task):
        text += "; beside it the number of Agarwal et al. (2024) where they have one"
    return text + "."


def _facts(run: Run) -> list[tuple[str, str]]:
    method, facts = run.method, [("folder", str(run.folder))]
    if method:
        facts.append(("method", method.title))
        details = [f"divergence {method.divergence}"] if method.divergence else []
        if method.beta is not None:
            details.append(f"β {method.beta:g}")
        if method.divergence:
            details.append(f"λ {method.on_policy_fraction}")
            details.append(f"teacher temperature {method.teacher_temperature}")
            details.append(f"sampling temperature {method.sampling_temperature}")
        if method.sample_ahead:
            details.append("sample ahead")
        if method.rl_alpha is not None:
            details.append(f"alpha {method.rl_alpha:g}, reward {method.reward}")
        facts.append(("loss", ", ".join(details) or "cross-entropy"))
    for role, model in (("student", run.student), ("teacher", run.teacher)):
        if model and (model.parameters or model.size):
            count = "" if model.parameters is None else f"{model.parameters:,} parameters"
            facts.append((role, ", ".join(part for part in (model.size, count) if part)))
    if run.task:
        amount = "all examples" if run.num_examples is None else f"{run.num_examples:,} examples"
        facts.append(("trained on", f"{run.task}, {amount}, batch {run.batch_size}"))
    steps = f"{run.last_step:,}" + ("" if run.finished else f" of {run.train_steps:,}, unfinished")
    facts += [("steps", steps), ("seed", "" if run.seed is None else str(run.seed))]
    facts += [("commit", run.commit or ""), ("devices", run.devices or "")]
    return [(name, value) for name, value in facts if value]


def _loss_chart(run: Run) -> str:
    """The loss; apart for the student's own samples and for the dataset's targets."""
    metric = next(
        (
            name
            for name in ("train/divergence", "train/cross_entropy", "train/loss")
            if run.curve(name)
        ),
        "train/loss",
    )
    title = metric.removeprefix("train/").replace("_", " ") + ", nats a token"
    on_policy = dict(run.curve("train/on_policy"))
    points = run.curve(metric)
    if len(set(on_policy.values())) > 1:
        own = [point for point in points if on_policy.get(point[0]) == 1]
        fixed = [point for point in points if on_policy.get(point[0]) == 0]
        return charts.line_chart(
            title,
            [
                Series("own samples", own, canvas.ACCENT, averaged=True),
                Series("dataset", fixed, canvas.WARM, averaged=True),
            ],
        )
    return charts.line_chart(title, [Series("", points, canvas.ACCENT, averaged=True)])


def _training_charts(run: Run) -> Sequence[str]:
    found = []
    for title, curves in _CURVES.items():
        series = [
            Series(name, run.curve(metric), colour, averaged=metric != "train/learning_rate")
            for (metric, name), colour in zip(curves, _COLOURS, strict=False)
        ]
        found.append(charts.line_chart(title, series))
    return found


def _evaluation_charts(run: Run) -> Sequence[str]:
    names = dict.fromkeys(name for line in run.lines for name in line if name.startswith("eval/"))
    return [
        charts.line_chart(
            name.removeprefix("eval/"),
            [Series("", run.curve(name), canvas.ACCENT)],
        )
        for name in names
    ]


def _page(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
