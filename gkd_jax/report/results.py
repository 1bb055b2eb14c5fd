"""From runs to the numbers of tables and figures: seeds of one configuration become one group."""

from collections.abc import Iterable, Sequence
import dataclasses
import math
import pathlib
import statistics
from typing import Any, NamedTuple

from gkd_jax.report import paper
from gkd_jax.report.record import Run, Setting, divergence_name


# Which metric of a task its table and figures show: the first that it has.
_PRIMARY = (
    "rouge2",
    "bleu",
    "accuracy",
    "exact_match",
    "accuracy_with_calculator",
)
# Said of a student, but not how good it is.
_NOT_QUALITY = ("teacher_divergence", "self_bleu", "entailment", "exact_answer", "brevity")
_DIVERGENCE_ORDER = (*paper.DIVERGENCES, "total_variation")


class Cell(NamedTuple):
    """Mean over n seeds; `error` is the standard error of the mean, None for one seed."""

    mean: float
    error: float | None
    n: int


def cell(values: Sequence[float]) -> Cell | None:
    """None for no values: a run that is missing."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Cell(statistics.fmean(values), error, len(values))


def minus(left: Cell | None, right: Cell | None) -> Cell | None:
    """The difference of two means; their errors are independent."""
    if left is None or right is None:
        return None
    error = None
    if left.error is not None and right.error is not None:
        error = math.hypot(left.error, right.error)
    return Cell(left.mean - right.mean, error, left.n)


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        runs: at least one, of different seeds.
        label: of the method, and what tells it from others of that label.
    """

    runs: tuple[Run, ...]
    label: str = ""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def kind(self) -> str:
        """As `Method.kind`, or "unknown" without a run.json."""
        return self.first.method.kind if self.first.method else "unknown"

    @property
    def size(self) -> str:
        return str(self.first.student)

    @property
    def fraction(self) -> float:
        """lambda; half where it follows a schedule."""
        fraction = self.first.method.on_policy_fraction if self.first.method else 0.0
        return 0.5 if isinstance(fraction, str) else fraction

    @property
    def teacher_temperature(self) -> float:
        """In training; 1 where it follows a schedule."""
        temperature = self.first.method.teacher_temperature if self.first.method else 1.0
        return 1.0 if isinstance(temperature, str) else temperature

    @property
    def on_grid(self) -> bool:
        """The paper's grid: Algorithm 1, samples at temperature 1, any divergence and lambda."""
        method = self.first.method
        return (
            method is not None
            and method.kind == "distillation"
            and method.mixing == "step"
            and method.num_samples == 1
            and method.sampling_temperature == 1.0
            and not isinstance(method.on_policy_fraction, str)
            and not isinstance(method.teacher_temperature, str)
            and not (method.sample_ahead or self.self_distilled)
        )

    @property
    def divergence(self) -> str:
        """As `paper.Number.method`: "jsd(0.1)", "forward_kl", or "sft" and "seqkd"."""
        return self.first.method.divergence_id if self.first.method else self.kind

    @property
    def amount(self) -> float:
        """Training examples; infinite where nothing limits them."""
        examples = self.first.num_examples
        return math.inf if examples is None else float(examples)

    @property
    def self_distilled(self) -> bool:
        """Whether the teacher is as large as the student."""
        student, teacher = self.first.student.parameters, self.first.teacher
        return teacher is not None and student is not None and teacher.parameters == student

    def cell(self, task: str, setting: Setting, metric: str) -> Cell | None:
        finals = (run.final(task, setting) for run in self.runs)
        return cell([values[metric] for values in finals if metric in values])


class Study:
    """All runs of a report, grouped.

    Attributes:
        runs: all of them.
        groups: what tables and figures show, in the order of their rows.
        left_out: runs that no group has, and why.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = tuple(runs)
        self.left_out: list[tuple[Run, str]] = []
        by_key: dict[tuple[Any, ...], dict[Any, Run]] = {}
        for run in runs:
            if not run.finished:
                reason = f"unfinished: step {run.last_step:,} of {run.train_steps:,}"
                self.left_out.append((run, reason))
                continue
            seeds = by_key.setdefault(_key(run), {})
            seed = run.folder if run.seed is None else run.seed
            if seed in seeds:
                reason = f"same configuration and seed as {seeds[seed].name}"
                self.left_out.append((run, reason))
                continue
            seeds[seed] = run
        groups = [Group(tuple(seeds.values())) for seeds in by_key.values()]
        self.groups = sorted(_labelled(groups), key=_order)

    def tasks(self) -> list[str]:
        """Every task that is evaluated, or should have been."""
        found = {evaluation.task for run in self.runs for evaluation in run.evaluations}
        return sorted(found | {run.eval_task for run in self.runs if run.eval_task})

    def settings(self, task: str) -> list[Setting]:
        """How the task was decoded, the most used first."""
        counts: dict[Setting, int] = {}
        for group in self.groups:
            for setting in dict.fromkeys(
                e.setting for run in group.runs for e in run.evaluations if e.task == task
            ):
                counts[setting] = counts.get(setting, 0) + 1
        return sorted(counts, key=lambda setting: (-counts[setting], str(setting)))

    def metrics(self, task: str) -> list[str]:
        """The task's primary metric first."""
        names = dict.fromkeys(
            name
            for group in self.groups
            for run in group.runs
            for evaluation in run.evaluations
            if evaluation.task == task
            for name in evaluation.values
        )
        known = paper.task_of(task)
        wanted = (*(paper.METRIC[known] if known else ()), *_PRIMARY)
        quality = [name for name in names if name not in _NOT_QUALITY]
        first = [name for name in wanted if name in quality] or quality
        return list(dict.fromkeys([*first[:1], *names]))

    def of_task(self, task: str) -> list[Group]:
        """Groups that were evaluated on a task, or whose configuration says so."""
        return [
            group
            for group in self.groups
            if any(
                run.eval_task == task or any(e.task == task for e in run.evaluations)
                for run in group.runs
            )
        ]

    def baseline(self, group: Group) -> Group | None:
        """The SFT runs that a distilled student started from, else any of its size."""
        parameters = group.first.student.parameters
        if group.kind in ("sft", "unknown") or parameters is None:
            return None
        sft = [
            other
            for other in self.groups
            if other.kind == "sft" and other.first.student.parameters == parameters
        ]
        started = [other for other in sft if _made(other, group.first.student.checkpoint)]
        same_task = [other for other in sft if other.first.eval_task == group.first.eval_task]
        return next(iter([*started, *same_task, *sft]), None)

    def teacher(self, group: Group) -> Group | None:
        """The SFT runs that made a group's teacher, else the only ones of its size."""
        teacher = group.first.teacher
        if teacher is None:
            return None
        sft = [other for other in self.groups if other.kind == "sft"]
        made = [other for other in sft if _made(other, teacher.checkpoint)]
        same_size = [
            other
            for other in sft
            if teacher.parameters is not None
            and other.first.student.parameters == teacher.parameters
        ]
        if made:
            return made[0]
        return same_size[0] if len(same_size) == 1 else None

    def gain(self, group: Group, task: str, setting: Setting, metric: str) -> Cell | None:
        """The improvement over `baseline`; None where either is missing."""
        baseline = self.baseline(group)
        if baseline is None:
            return None
        return minus(group.cell(task, setting, metric), baseline.cell(task, setting, metric))


def paper_number(group: Group, task: str, setting: Setting, metric: str) -> paper.Number | None:
    """The paper's number of the same cell: all data, its decoding, distillation without RL."""
    comparable = group.on_grid or group.self_distilled or group.kind in ("sft", "seqkd")
    if not comparable or group.first.num_examples is not None:
        return None
    decoding = setting.decoding
    if decoding == "sample" and setting.temperature != 1:
        return None
    return paper.find(
        task=task,
        metric=metric,
        decoding=decoding,
        size=group.first.student.size,
        method=group.divergence,
        on_policy_fraction=group.fraction,
        self_distilled=group.self_distilled,
    )


class View(NamedTuple):
    """What one set of figures is about."""

    study: Study
    task: str
    setting: Setting
    metric: str

    @property
    def groups(self) -> list[Group]:
        """Those with a value here."""
        return [group for group in self.study.of_task(self.task) if self.cell(group)]

    def cell(self, group: Group) -> Cell | None:
        return group.cell(self.task, self.setting, self.metric)

    def gain(self, group: Group) -> Cell | None:
        return self.study.gain(group, self.task, self.setting, self.metric)

    def paper(self, group: Group) -> paper.Number | None:
        return paper_number(group, self.task, self.setting, self.metric)

    def start(self, size: str) -> tuple[str, float] | None:
        """The SFT students of a size, as a reference line."""
        sft = [group for group in self.groups if group.kind == "sft" and group.size == size]
        cell = self.cell(sft[0]) if len(sft) == 1 else None
        return ("SFT student", cell.mean) if cell else None

    def teacher(self, groups: Sequence[Group]) -> tuple[str, float] | None:
        """The one teacher of all of these groups, as a reference line."""
        teachers = {id(teacher): teacher for g in groups if (teacher := self.study.teacher(g))}
        if len(teachers) != 1:
            return None
        cell = self.cell(next(iter(teachers.values())))
        return ("teacher", cell.mean) if cell else None


def grid(groups: Iterable[Group]) -> list[Group]:
    """Those of divergence x lambda; of several in a cell, the one with most data, then seeds."""
    cells: dict[Any, Group] = {}
    for group in groups:
        if group.on_grid:
            key = (group.size, group.divergence, group.fraction, group.teacher_temperature)
            steps = group.first.train_steps or 0
            held = cells.setdefault(key, group)
            held_rank = (held.amount, len(held.runs), held.first.train_steps or 0)
            if (group.amount, len(group.runs), steps) > held_rank:
                cells[key] = group
    return list(cells.values())


def sizes(groups: Iterable[Group]) -> list[str]:
    """Student sizes, the smallest first, those that are not recorded last."""
    parameters: dict[str, float] = {}
    for group in groups:
        count = group.first.student.parameters
        parameters.setdefault(group.size, math.inf if count is None else count)
    return sorted(parameters, key=lambda size: (parameters[size], size))


def on_most_data(groups: Iterable[Group]) -> list[Group]:
    """Of groups that differ in how much data they saw, the one with the most."""
    best: dict[Any, Group] = {}
    for group in groups:
        key = _key(group.first, without=("num_examples",))
        if key not in best or group.amount > best[key].amount:
            best[key] = group
    return list(best.values())


def without_amount(group: Group) -> tuple[Any, ...]:
    """Equal for groups that differ in the amount of data only."""
    return _key(group.first, without=("num_examples",))


def plain_label(group: Group) -> str:
    """A label without the amount of data, where a figure shows or fixes it."""
    parts = group.label.split(" · ")
    return " · ".join(part for part in parts if not part.endswith(" examples"))


def divergence_order(divergence: str) -> tuple[int, str]:
    """The paper's, from mean-seeking to mode-seeking."""
    known = divergence in _DIVERGENCE_ORDER
    return (_DIVERGENCE_ORDER.index(divergence) if known else len(_DIVERGENCE_ORDER), divergence)


def _fields(run: Run) -> dict[str, Any]:
    """What makes two runs of one label and size different methods, in the order of suffixes."""
    method, teacher = run.method, run.teacher
    if method is None:
        return {"name": run.name}
    return {
        "divergence": (method.divergence, method.beta),
        "on_policy_fraction": method.on_policy_fraction,
        "mixing": method.mixing,
        "num_samples": method.num_samples,
        "sample_ahead": method.sample_ahead,
        "rl_alpha": method.rl_alpha,
        "reward": method.reward,
        "teacher": None if teacher is None else (teacher.parameters, teacher.size),
        "teacher_temperature": method.teacher_temperature,
        "student_temperature": method.student_temperature,
        "sampling_temperature": method.sampling_temperature,
        "task": run.task,
        "num_examples": run.num_examples,
        "batch_size": run.batch_size,
        "learning_rate": run.learning_rate,
        "train_steps": run.train_steps,
    }


def _key(run: Run, without: Sequence[str] = ()) -> tuple[Any, ...]:
    fields = tuple((name, value) for name, value in _fields(run).items() if name not in without)
    student = run.student
    return (run.label, student.parameters, student.size, run.eval_task, *fields)


def _labelled(groups: list[Group]) -> list[Group]:
    """Adds to each label what differs within one label and size."""
    alike: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        alike.setdefault((group.first.label, group.size, group.first.eval_task), []).append(group)
    varying: dict[Any, set[str]] = {}
    for (label, _, eval_task), members in alike.items():
        all_fields = [_fields(group.first) for group in members]
        names = varying.setdefault((label, eval_task), set())
        names |= {
            name
            for name in all_fields[0]
            if len({repr(fields.get(name)) for fields in all_fields}) > 1
        }
    return [
        Group(group.runs, " · ".join([group.first.label, *_suffixes(group, varying)]))
        for group in groups
    ]


def _suffixes(group: Group, varying: dict[Any, set[str]]) -> list[str]:
    run = group.first
    fields = _fields(run)
    names = [name for name in fields if name in varying.get((run.label, run.eval_task), ())]
    return [_said(name, fields[name], group) for name in names]


def _said(name: str, value: Any, group: Group) -> str:
    run = group.first
    match name:
        case "divergence":
            return divergence_name(group.divergence)
        case "on_policy_fraction":
            return f"λ by {value}" if isinstance(value, str) else f"λ = {value:g}"
        case "mixing":
            return f"mixed by {value}"
        case "num_samples":
            return f"{value} samples a prompt"
        case "rl_alpha":
            return "no RL" if value is None else f"alpha {value:g}"
        case "teacher":
            return "no teacher" if run.teacher is None else f"teacher {run.teacher}"
        case "num_examples":
            return "all examples" if value is None else f"{value:,} examples"
        case "train_steps":
            return "steps not recorded" if value is None else f"{value:,} steps"
        case "batch_size":
            return f"batch {value}"
        case "task":
            return f"trained on {'/'.join((value or '').split('/')[-2:])}"
        case _:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            return f"{name.replace('_', ' ')} {shown}"


def _order(group: Group) -> tuple[Any, ...]:
    kinds = ("sft", "seqkd", "distillation", "rl", "unknown")
    method = group.first.method
    alpha = method.rl_alpha if method and method.rl_alpha is not None else 0.0
    parameters = group.first.student.parameters
    return (
        kinds.index(group.kind),
        group.fraction,
        divergence_order(group.divergence),
        alpha,
        group.amount,
        group.label,
        math.inf if parameters is None else parameters,
    )


def _made(group: Group, checkpoint: str | None) -> bool:
    """Whether a checkpoint lies in one of the group's folders, or did before they were moved."""
    if not checkpoint:
        return False
    path = pathlib.Path(checkpoint).resolve()
    folders = [run.folder for run in group.runs]
    return any(path.is_relative_to(folder) or path.name == folder.name for folder in folders)
