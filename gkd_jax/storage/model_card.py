"""Writes the README.md of an exported model: its origin, its training and its last evaluation."""

from typing import Any

from gkd_jax.text import files, settings, task_names


def of_run(folder: files.AnyPath) -> str | None:
    """Returns the model card of a run as Markdown; None if there is no readable run.json."""
    run = files.read_record(folder / "run.json")
    if run is None:
        return None
    recipe = run.get("recipe", {})
    student, teacher = recipe.get("student") or {}, recipe.get("teacher") or {}
    method, data = recipe.get("method") or {}, recipe.get("data") or {}
    base = student.get("checkpoint") or "random weights"
    task = data.get("task")
    lines = [
        f"# {run.get('name') or folder.name}",
        "",
        "Distilled with gkd_jax (on-policy distillation, Agarwal et al., 2024).",
        "",
        f"- Base model: {base}",
        f"- Teacher: {_teacher(teacher)}",
        f"- Method: {_method(method)}",
        f"- Data: {task if isinstance(task, str) else ' + '.join(task or ())}",
        f"- Steps: {(recipe.get('train') or {}).get('train_steps')}, "
        f"batches of {data.get('batch_size')} prompts",
    ]
    metrics = task_names.last_evaluation(files.read_records(folder / "metrics.jsonl")[0])
    if metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| eval/{name} | {value:.4g} |" for name, value in sorted(metrics.items())]
    return "\n".join(lines) + "\n"


def _teacher(teacher: dict[str, Any]) -> str:
    if "models" in teacher:
        return "; ".join(f"{_teacher(one)} for {task}" for task, one in teacher["models"].items())
    return teacher.get("checkpoint") or teacher.get("size") or "none"


def _method(method: dict[str, Any]) -> str:
    divergence = method.get("divergence")
    if divergence is None:
        return "cross-entropy of the data's targets"
    fraction = method.get("on_policy_fraction")
    return f"{settings.in_words(divergence)}, on-policy fraction {settings.in_words(fraction)}"
