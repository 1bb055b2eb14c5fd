"""Metrics to other places: the calls that the clients get, and any function of the same type."""

import json
import sys
import types

import pytest
from small_runs import options
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gkd_jax.training import metrics, trackers, train
from gkd_jax.training.recipe import TrainConfig, describe


class Client(types.ModuleType):
    """A module whose functions record their calls, with what is open at the time."""

    def __init__(self, name, opens):
        super().__init__(name)
        self.calls, self.run, self._opens = [], None, opens

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **more):
            self.calls.append((name, arguments, more))
            if name == self._opens:
                self.run = object()

        return call

    def active_run(self):
        return self.run


def test_wandb_is_opened_once_and_counts_our_steps(monkeypatch):
    client = Client("wandb", "init")
    monkeypatch.setitem(sys.modules, "wandb", client)
    tracker = trackers.WandB(project="mine", name="first")
    tracker(1, {"train/loss": 2.0})
    tracker(2, {"train/loss": 1.0})
    names = [name for name, _, _ in client.calls]
    assert names == ["init", "define_metric", "log", "log"]
    opened = client.calls[0][2]
    assert (opened["project"], opened["id"], opened["resume"]) == ("mine", "first", "allow")
    assert client.calls[3][1] == ({"step": 2, "train/loss": 1.0},)


def test_mlflow_is_opened_once(monkeypatch):
    client = Client("mlflow", "start_run")
    monkeypatch.setitem(sys.modules, "mlflow", client)
    tracker = trackers.MLflow(name="first", tracking_uri="file:/tmp/runs")
    tracker(1, {"train/loss": 2.0})
    tracker(2, {"train/loss": 1.0})
    names = [name for name, _, _ in client.calls]
    expected = ["set_tracking_uri", "set_experiment", "start_run", "log_metrics", "log_metrics"]
    assert names == expected
    assert client.calls[4][1:] == (({"train/loss": 1.0},), {"step": 2})


def test_a_client_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ModuleNotFoundError, match="METRICS_TO needs wandb, which is not installed: pip install"
    ):
        trackers.WandB()(1, {})


def test_a_dry_run_misses_a_client(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    config = TrainConfig(train_steps=2, metrics_to=(trackers.MLflow(),))
    with pytest.raises(ModuleNotFoundError, match="METRICS_TO needs mlflow, which is not"):
        train.train(**options(tmp_path, steps=2, train=config), dry_run=True)


def test_a_tracker_of_one_s_own_needs_the_package_of_its_kind(monkeypatch):
    class Mine(trackers.MLflow):
        pass

    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    trackers.check_installed([Mine(), print])


def test_a_run_gives_every_line_to_any_function(tmp_path):
    seen = []
    config = TrainConfig(train_steps=2, metrics_to=(lambda step, values: seen.append(step),))
    json.dumps(describe(TrainConfig(train_steps=2, metrics_to=(trackers.MLflow(),))))
    train.train(**options(tmp_path, steps=2, train=config))
    assert seen == [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_tensorboard_reads_every_number(tmp_path):
    writer = metrics.Writer(str(tmp_path), resume_step=0)
    for step in (1, 2):
        writer.write(step, {"train/loss": 0.5 * step, "eval/task/accuracy": 7.0})
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(board.Tags()["scalars"]) == ["eval/task/accuracy", "train/loss"]
    found = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert found == [(1, 0.5), (2, 1.0)]
