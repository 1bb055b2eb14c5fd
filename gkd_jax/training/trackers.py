"""Takes a run's numbers to Weights & Biases or MLflow, through their own clients.

    gkd-jax train ... --gin.METRICS_TO="(@trackers.WandB(),)" --gin.trackers.WandB.project=mine

METRICS_TO is a tuple of functions (step, values). Any function of that type will do, and a gin file
can import it. In a job of several processes only the first one calls them.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import importlib
from typing import Any

from gkd_jax.text import settings
from gkd_jax.text.extras import install_command


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandB:
    """Logs to Weights & Biases (`pip install wandb`).

    Attributes:
        project: the project there.
        name: the name and the id of the run. With a name, a resumed run continues the same run
            there; None makes a new one at each start.
        mode: "online" or "offline".
    """

    project: str = "gkd_jax"
    name: str | None = None
    mode: str = "online"

    def __post_init__(self):
        settings.check_types(self)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers of a step. The first call opens the run."""
        wandb = _client("wandb")
        if wandb.run is None:
            wandb.init(
                project=self.project, name=self.name, id=self.name, resume="allow", mode=self.mode
            )
            # A resumed run logs some steps again, which W&B's own count of steps refuses.
            wandb.define_metric("*", step_metric="step")
        wandb.log({"step": step, **values})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLflow:
    """Logs to MLflow (`pip install mlflow-skinny`).

    Attributes:
        experiment: the experiment there.
        name: the name of the run; None lets MLflow choose one.
        tracking_uri: the address of the server or a folder; None takes MLFLOW_TRACKING_URI.
    """

    experiment: str = "gkd_jax"
    name: str | None = None
    tracking_uri: str | None = None

    def __post_init__(self):
        settings.check_types(self)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers of a step. The first call opens the run."""
        mlflow = _client("mlflow")
        if mlflow.active_run() is None:
            if self.tracking_uri is not None:
                mlflow.set_tracking_uri(self.tracking_uri)
            mlflow.set_experiment(self.experiment)
            mlflow.start_run(run_name=self.name)
        mlflow.log_metrics(dict(values), step=step)


def check_installed(functions: Iterable[Any]) -> None:
    """Raises ModuleNotFoundError if one of METRICS_TO needs a package that is not installed."""
    for function in functions:
        for kind, package in ((WandB, "wandb"), (MLflow, "mlflow")):
            if isinstance(function, kind):
                _client(package)


def _client(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"METRICS_TO needs {name}, which is not installed: {install_command(name)}"
        ) from None
