"""`gkd-jax sweep` starts, skips and orders runs as documented; a stand-in replaces the runs."""

import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from waiting import wait_for

from gkd_jax.command_line import recipes


ROOT = pathlib.Path(__file__).resolve().parent.parent
ARITHMETIC = ROOT / "gin" / "sweeps" / "arithmetic.toml"

# Writes its arguments to calls.jsonl beside itself, and a checkpoint where MODEL_DIR is. A file
# named after the run's folder, `<folder>.status`, is its exit status; `<folder>.wait` is the
# seconds that it waits for SIGTERM, at which it exits 143; `<folder>.until` is a run to wait for.
STAND_IN = """
import json, os, pathlib, re, signal, sys, time
here = pathlib.Path(__file__).parent
match = re.search(r"--gin.(?:MODEL_DIR|OUTPUT)='([^']*)'", "\\n".join(sys.argv))
folder = pathlib.Path(match[1])
folder = folder.parent if folder.suffix == ".jsonl" else folder
name = folder.name
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps([name, sys.argv[1:]]) + "\\n")
if "--dry_run" not in sys.argv:
    (folder / "checkpoint").write_text("")
wait = here / f"{name}.wait"
if wait.exists():
    time.sleep(float(wait.read_text()))
until = here / f"{name}.until"
while until.exists() and not (folder.parent / until.read_text() / "checkpoint").exists():
    time.sleep(0.02)
status = here / f"{name}.status"
if status.exists():
    print("it went wrong")
    sys.exit(int(status.read_text()))
"""

CHAIN = """
gin_file = "gin/gkd.gin"
[axes]
RANDOM_SEED = [0, 1]
[rows.gkd]
macros = { STUDENT_CHECKPOINT = "'{student}'", TEACHER_CHECKPOINT = "'{teacher}'" }
[rows.student]
gin_file = ["gin/sft.gin", "sizes.gin"]
macros = { TRAIN_STEPS = 500, LENGTHS = { inputs = 4 }, LEARNING_RATE = 1e-4 }
[rows.teacher]
axes.RANDOM_SEED = []
macros.DATA_DIR = '"a b"'
"""
CHAIN_RUNS = [
    "student-RANDOM_SEED=0",
    "student-RANDOM_SEED=1",
    "teacher",
    "gkd-RANDOM_SEED=0",
    "gkd-RANDOM_SEED=1",
]


class Sweep:
    """Runs `gkd-jax sweep` in a folder of its own."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.output = folder, folder / "runs"
        (folder / "stand_in.py").write_text(STAND_IN)

    def write(self, text: str) -> str:
        path = self.folder / "sweep.toml"
        path.write_text(text)
        return f"--sweep_file={path}"

    def command(self, *flags: str) -> list[str]:
        program = shlex.join([sys.executable, "-S", str(self.folder / "stand_in.py")])
        own = [f"--output={self.output}", f"--command={program}"]
        return [sys.executable, "-m", "gkd_jax", "sweep", *own, *flags]

    def __call__(self, *flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(*flags), capture_output=True, text=True, timeout=60)

    def calls(self) -> list[tuple[str, list[str]]]:
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(json.loads(line)) for line in lines]

    def names(self) -> list[str]:
        return [name for name, _ in self.calls()]


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def assert_usage_error(result, *words):
    assert result.returncode == 2
    assert result.stderr.startswith("gkd-jax: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_grid_runs_every_combination_once_and_then_nothing(sweep):
    flags = (
        "--gin_file=gin/gkd.gin",
        "--grid=DIVERGENCE=@divergences.forward_kl,@divergences.reverse_kl",
        "--grid=ON_POLICY_FRACTION=0.0,1.0",
        "--gin.STUDENT_SIZE='tiny'",
    )
    result = sweep(*flags)
    assert result.returncode == 0, result.stderr
    assert sweep.names() == [
        "gkd-DIVERGENCE=forward_kl-ON_POLICY_FRACTION=0.0",
        "gkd-DIVERGENCE=forward_kl-ON_POLICY_FRACTION=1.0",
        "gkd-DIVERGENCE=reverse_kl-ON_POLICY_FRACTION=0.0",
        "gkd-DIVERGENCE=reverse_kl-ON_POLICY_FRACTION=1.0",
    ]
    name, arguments = sweep.calls()[2]
    assert arguments == [
        "train",
        "--gin_file=gin/gkd.gin",
        "--gin.STUDENT_SIZE='tiny'",
        "--gin.DIVERGENCE=@divergences.reverse_kl",
        "--gin.ON_POLICY_FRACTION=0.0",
        f"--gin.MODEL_DIR='{sweep.output / name}'",
    ]
    assert sweep(*flags).returncode == 0
    assert len(sweep.calls()) == 4
    # A larger grid runs only what is new.
    flags = (*flags[:2], "--grid=ON_POLICY_FRACTION=0.0,0.5,1.0", flags[3])
    assert sweep(*flags).returncode == 0
    assert [name.rpartition("=")[2] for name in sweep.names()[4:]] == ["0.5", "0.5"]


def test_a_divergence_and_its_beta_are_one_axis(sweep):
    flags = ("--gin_file=gin/gkd.gin", "--grid=divergence=forward_kl,jsd_0.1,total_variation")
    assert sweep(*flags).returncode == 0
    settings = [
        {
            text.removeprefix("--gin.")
            for text in arguments
            if "DIVERGENCE" in text or "BETA" in text
        }
        for _, arguments in sweep.calls()
    ]
    assert sweep.names() == [
        "gkd-divergence=forward_kl",
        "gkd-divergence=jsd_0.1",
        "gkd-divergence=total_variation",
    ]
    assert settings == [
        {"DIVERGENCE=@divergences.forward_kl"},
        {"DIVERGENCE=@divergences.jsd", "BETA=0.1"},
        {"DIVERGENCE=@divergences.total_variation"},
    ]
    for wrong in ("jsd", "jsd_1", "kl"):
        result = sweep("--gin_file=gin/gkd.gin", f"--grid=divergence={wrong}")
        assert_usage_error(result, "jsd_BETA", f"'{wrong}'")


def test_a_divergence_of_every_row_names_the_run_that_a_row_of_eval_decodes(sweep):
    file = """
gin_file = "gin/gkd.gin"
axes.divergence = ["forward_kl", "jsd_0.1"]
[rows.gkd]
[rows.decoded]
command = "eval"
gin_file = "gin/eval.gin"
macros.CHECKPOINT = "'{gkd}'"
"""
    result = sweep(sweep.write(file), "--print")
    assert result.returncode == 0, result.stderr
    decoded = [line for line in result.stdout.splitlines() if " eval " in line]
    assert len(decoded) == 2
    for line, name in zip(decoded, ("forward_kl", "jsd_0.1"), strict=True):
        assert f"{sweep.output}/gkd-divergence={name}'" in line
        assert f"{sweep.output}/decoded-divergence={name}'" in line
        assert "DIVERGENCE=" not in line
        assert "BETA=" not in line


def paper_sweep(sweep, task, *flags) -> dict[str, dict[str, str]]:
    """Folder -> flags, for the commands of a sweep of gin/paper."""
    path = ROOT / "gin" / "paper" / "sweeps" / f"{task}.toml"
    result = sweep(f"--sweep_file={path}", "--print", *flags)
    assert result.returncode == 0, result.stderr
    found = {}
    for line in result.stdout.splitlines():
        words = [text for text in shlex.split(line) if text.startswith("--gin")]
        values = dict(text.removeprefix("--gin.").split("=", 1) for text in words)
        assert (ROOT / values["--gin_file"]).is_file()
        output = values.get("MODEL_DIR") or values["OUTPUT_DIR"]
        found[pathlib.Path(output.strip("'")).name] = values
    return found


def test_the_paper_s_grids_have_every_cell(sweep):
    def names(runs, row):
        return [name for name in runs if name.startswith(f"{row}-")]

    xsum = paper_sweep(sweep, "xsum")
    # A.13 and A.12: 3 sizes x 3 lambdas x 5 divergences; Figure 3: 4 x 3; Figure 4: 5 x 4.
    assert [
        len(names(xsum, row)) for row in ("greedy", "sampled", "data_fraction", "diversity")
    ] == [
        45,
        45,
        12,
        20,
    ]
    for name in names(xsum, "sampled"):
        assert (xsum[name]["TEACHER_TEMPERATURE"], xsum[name]["EVAL_DECODING"]) == (
            "0.1",
            "'sample'",
        )
    cell = "STUDENT_SIZE=small-ON_POLICY_FRACTION=1.0-divergence=jsd_0.9"
    assert (
        xsum[f"diversity-{cell}-TEMPERATURE=0.3"]["CHECKPOINT"] == f"'{sweep.output}/greedy-{cell}'"
    )
    assert (xsum[f"greedy-{cell}"]["DIVERGENCE"], xsum[f"greedy-{cell}"]["BETA"]) == (
        "@divergences.jsd",
        "0.9",
    )
    assert (
        xsum[f"greedy-{cell}"]["STUDENT_CHECKPOINT"]
        == f"'{sweep.output}/student-STUDENT_SIZE=small'"
    )
    gsm8k = paper_sweep(sweep, "gsm8k", "--grid=RANDOM_SEED=0")
    # Figures 7 and A.14: 3 x 3 x 5; Figure 8: 4 more lambdas x 2 divergences.
    assert [len(names(gsm8k, row)) for row in ("gkd", "lambda_curve")] == [45, 8]
    wmt = paper_sweep(sweep, "wmt")
    assert [len(names(wmt, row)) for row in ("gkd", "f_distill")] == [2 * 3 * 5 * 3, 2 * 3]
    part = paper_sweep(
        sweep, "xsum", "--rows=diversity", "--grid=divergence=reverse_kl", "--grid=TEMPERATURE=1.0"
    )
    (name,) = names(part, "diversity")
    assert "DIVERGENCE" not in part[name]  # what decodes has none


def test_grid_values_may_hold_commas(sweep):
    result = sweep(
        "--gin_file=gin/gkd.gin",
        "--grid=TASK_FEATURE_LENGTHS={'inputs': 4, 'targets': 2},{'inputs': 8, 'targets': 4}",
        "--grid=MIXTURE_OR_TASK_NAME='a,b','c'",
        "--print",
    )
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(lines) == 4
    assert "--gin.TASK_FEATURE_LENGTHS={'inputs': 4, 'targets': 2}" in lines[0]
    assert "--gin.MIXTURE_OR_TASK_NAME='a,b'" in lines[0]


def test_rows_run_after_what_they_name(sweep):
    result = sweep(sweep.write(CHAIN))
    assert result.returncode == 0, result.stderr
    assert sweep.names() == CHAIN_RUNS
    calls = dict(sweep.calls())
    # The student with the same seed; the one teacher.
    assert (
        f"--gin.STUDENT_CHECKPOINT='{sweep.output}/student-RANDOM_SEED=1'"
        in calls["gkd-RANDOM_SEED=1"]
    )
    assert f"--gin.TEACHER_CHECKPOINT='{sweep.output}/teacher'" in calls["gkd-RANDOM_SEED=1"]
    assert calls["student-RANDOM_SEED=0"] == [
        "train",
        "--gin_file=gin/sft.gin",
        "--gin_file=sizes.gin",
        "--gin.TRAIN_STEPS=500",
        "--gin.LENGTHS={'inputs': 4}",
        "--gin.LEARNING_RATE=0.0001",
        "--gin.RANDOM_SEED=0",
        f"--gin.MODEL_DIR='{sweep.output}/student-RANDOM_SEED=0'",
    ]
    assert '--gin.DATA_DIR="a b"' in calls["teacher"]


def test_several_at_once_still_wait_for_what_they_need(sweep):
    # It would wait for ever if what seed 1 starts from did not go on beside it.
    (sweep.folder / "student-RANDOM_SEED=0.until").write_text("gkd-RANDOM_SEED=1")
    result = sweep(sweep.write(CHAIN), "--num_parallel=2")
    assert result.returncode == 0, result.stderr
    names = sweep.names()
    assert sorted(names) == sorted(CHAIN_RUNS)
    assert names[-1] == "gkd-RANDOM_SEED=0"


def test_infer_writes_a_file_that_others_can_name(sweep):
    text = """
    [rows.data]
    command = "infer"
    gin_file = "gin/infer.gin"
    macros.NUM_EXAMPLES = "None"
    [rows.seqkd]
    gin_file = "gin/seqkd.gin"
    macros.MIXTURE_OR_TASK_NAME = "'{data}/outputs.jsonl'"
    """
    overrides = ["--gin.TRAIN_STEPS=4", "--gin.NUM_EXAMPLES=8"]
    assert sweep(sweep.write(text), *overrides).returncode == 0
    (_, infer), (_, train) = sweep.calls()
    output = f"'{sweep.output}/data/outputs.jsonl'"
    # infer.gin has no TRAIN_STEPS: only what the row sets itself is overridden.
    assert infer == [
        "infer",
        "--gin_file=gin/infer.gin",
        "--gin.NUM_EXAMPLES=8",
        f"--gin.OUTPUT={output}",
    ]
    assert f"--gin.MIXTURE_OR_TASK_NAME={output}" in train
    assert "--gin.TRAIN_STEPS=4" in train


def test_a_failure_is_reported_and_the_rest_runs(sweep):
    status = sweep.folder / "student-RANDOM_SEED=0.status"
    status.write_text("1")
    flag = sweep.write(CHAIN)
    result = sweep(flag)
    assert result.returncode == 1
    assert sweep.names() == [name for name in CHAIN_RUNS if name != "gkd-RANDOM_SEED=0"]
    log = sweep.output / "student-RANDOM_SEED=0" / "log.txt"
    assert f"FAILED student-RANDOM_SEED=0: status 1 (log: {log}): it went wrong" in result.stderr
    assert "gkd-RANDOM_SEED=0: not run, it needs student-RANDOM_SEED=0" in result.stderr
    assert "it went wrong" in log.read_text()
    # Mended, the same command does what is left.
    status.unlink()
    before = len(sweep.calls())
    result = sweep(flag)
    assert result.returncode == 0, result.stderr
    assert sweep.names()[before:] == ["student-RANDOM_SEED=0", "gkd-RANDOM_SEED=0"]


def test_a_changed_command_is_refused_or_put_aside(sweep):
    assert sweep(sweep.write(CHAIN)).returncode == 0
    flag = sweep.write(CHAIN.replace("TRAIN_STEPS = 500", "TRAIN_STEPS = 600"))
    before = len(sweep.calls())
    result = sweep(flag)
    assert_usage_error(result, "student-RANDOM_SEED=0", "TRAIN_STEPS=500", "TRAIN_STEPS=600")
    assert len(sweep.calls()) == before
    # What starts from a changed run has changed too, though its own command has not.
    result = sweep(flag, "--redo_changed")
    assert result.returncode == 0, result.stderr
    assert sweep.names()[before:] == [name for name in CHAIN_RUNS if name != "teacher"]
    assert "what it starts from has changed: student-RANDOM_SEED=1" in result.stderr
    assert (sweep.output / "gkd-RANDOM_SEED=1.replaced_1" / "checkpoint").exists()


def test_a_command_that_never_wrote_anything_may_be_changed(sweep):
    grid = ["--gin_file=gin/gkd.gin", "--grid=RANDOM_SEED=0"]
    assert sweep(*grid).returncode == 0
    folder = sweep.output / "gkd-RANDOM_SEED=0"
    (folder / "sweep_done").unlink()
    assert_usage_error(sweep(*grid, "--gin.TRAIN_STEPS=4"), "TRAIN_STEPS=4")
    (folder / "checkpoint").unlink()
    assert sweep(*grid, "--gin.TRAIN_STEPS=4").returncode == 0


def test_a_moved_study_is_still_done(sweep):
    flag = sweep.write(CHAIN)
    assert sweep(flag).returncode == 0
    sweep.output = sweep.output.rename(sweep.folder / "moved")
    assert sweep(flag).returncode == 0
    assert len(sweep.calls()) == len(CHAIN_RUNS)


def test_preemption_of_a_run_stops_the_sweep(sweep):
    (sweep.folder / "student-RANDOM_SEED=0.status").write_text("143")
    result = sweep(sweep.write(CHAIN))
    assert result.returncode == 143
    assert sweep.names() == CHAIN_RUNS[:1]
    assert "5 to go" in result.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_let_runs_save_and_stop(sweep, number, status):
    for name in CHAIN_RUNS[:2]:
        (sweep.folder / f"{name}.wait").write_text("60")
    flag = sweep.write(CHAIN)
    process = subprocess.Popen(
        sweep.command(flag, "--num_parallel=2"), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(sweep.calls()) == 2)
    # Another sweep of the same folder would run the same runs.
    assert_usage_error(sweep(flag), "another sweep")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert errors.count("stopped with status 143") == 2
    assert sorted(sweep.names()) == CHAIN_RUNS[:2]
    for name in CHAIN_RUNS[:2]:
        (sweep.folder / f"{name}.wait").unlink()
    assert sweep(flag).returncode == 0
    assert sorted(set(sweep.names())) == sorted(CHAIN_RUNS)


def test_a_run_that_outlives_its_sweep_is_not_run_twice(sweep):
    (sweep.folder / "gkd-RANDOM_SEED=0.wait").write_text("60")
    flags = ["--gin_file=gin/gkd.gin", "--grid=RANDOM_SEED=0"]
    process = subprocess.Popen(sweep.command(*flags), stderr=subprocess.DEVNULL)
    wait_for(lambda: sweep.calls())
    process.kill()
    process.wait()
    assert_usage_error(sweep(*flags), "another sweep")
    # The run still holds the lock; it is found by its folder, in the arguments.
    name = str(sweep.output / "gkd-RANDOM_SEED=0")
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"--gin.MODEL_DIR='{name}'" in path.read_text(errors="replace"):
                os.kill(int(path.parent.name), signal.SIGTERM)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    (sweep.folder / "gkd-RANDOM_SEED=0.wait").unlink()
    wait_for(lambda: is_free(sweep.output / ".sweep_lock"))
    assert sweep(*flags).returncode == 0


def is_free(path):
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_print_is_for_a_shell_and_writes_nothing(sweep):
    result = sweep(sweep.write(CHAIN), "--print", "--", "--tfds_data_dir=/data sets")
    assert result.returncode == 0
    assert result.stderr == ""
    assert not sweep.output.exists()
    lines = result.stdout.splitlines()
    assert len(lines) == len(CHAIN_RUNS)
    for name in CHAIN_RUNS:
        (sweep.output / name).mkdir(parents=True)
    for line in lines:
        subprocess.run(["bash", "-c", line], check=True, timeout=30)
    printed = dict(sweep.calls())
    shutil.rmtree(sweep.output)
    (sweep.folder / "calls.jsonl").unlink()
    assert sweep(sweep.write(CHAIN), "--", "--tfds_data_dir=/data sets").returncode == 0
    assert dict(sweep.calls()) == printed
    assert all(arguments[-1] == "--tfds_data_dir=/data sets" for arguments in printed.values())


def test_dry_run_checks_what_can_be_checked_and_writes_nothing(sweep):
    result = sweep(sweep.write(CHAIN), "--dry_run")
    assert result.returncode == 0, result.stderr
    assert sweep.names() == ["student-RANDOM_SEED=0", "student-RANDOM_SEED=1", "teacher"]
    assert all(arguments[-1] == "--dry_run" for _, arguments in sweep.calls())
    assert "gkd-RANDOM_SEED=0: not checked, it needs student-RANDOM_SEED=0" in result.stderr
    assert not sweep.output.exists()
    (sweep.folder / "teacher.status").write_text("2")
    result = sweep(sweep.write(CHAIN), "--dry_run")
    assert result.returncode == 1
    assert "FAILED teacher: status 2: it went wrong" in result.stderr


def test_rows_and_axes_can_be_chosen(sweep):
    flag = sweep.write(CHAIN)
    assert sweep(flag, "--rows=gkd", "--grid=RANDOM_SEED=7").returncode == 0
    assert sweep.names() == ["student-RANDOM_SEED=7", "teacher", "gkd-RANDOM_SEED=7"]
    assert_usage_error(sweep(flag, "--grid=SEED=7"), "--grid SEED", "RANDOM_SEED")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--gin_file", "--sweep_file"]),
        (["--gin_file=a.gin", "--sweep_file=b.toml"], ["either"]),
        (["--gin_file=a.gin", "--grid=RANDOM_SEED"], ["--grid 'RANDOM_SEED'", "VALUE,VALUE"]),
        (["--gin_file=a.gin", "--grid=X=1,,2"], ["between commas"]),
        (["--gin_file=a.gin", "--grid=X='a,b"], ["quotes"]),
        (["--gin_file=a.gin", "--grid=X=1,1"], ["different names"]),
        (["--gin_file=a.gin", "--grid=X=1", "--grid=X=2"], ["twice"]),
        (["--gin_file=a.gin", "--grid=X=1", "--gin.X=2"], ["--grid", "--gin.X"]),
        (["--gin_file=a.gin", "--grid=divergence=jsd_0.1", "--gin.BETA=2"], ["--grid", "BETA"]),
        (
            ["--gin_file=a.gin", "--grid=divergence=jsd_0.1", "--grid=BETA=0.1,0.9"],
            ["'divergence' and 'BETA' both set BETA"],
        ),
        (["--gin_file=a.gin", "--gin.MODEL_DIR=/tmp/x"], ["sets MODEL_DIR"]),
        (["--gin_file=a.gin", "--grid=MODEL_DIR=x,y"], ["sets MODEL_DIR"]),
        (["--gin_file=a.gin", "--gin.X"], ["no value"]),
        (["--gin_file=a.gin", "--rows=x"], ["--sweep_file"]),
        (["--gin_file=a.gin", "--num_parallel=0"], ["at least 1"]),
        (["--gin_file=a.gin", "--paralel=2"], ["paralel"]),
        (["--gin_file=a.gin", "extra"], ["flags only"]),
        (["--gin_file=a.gin", "--output=/tmp/it's"], ["quotes"]),
        (["--gin_file=a.gin", "--command=no_such_program_here"], ["no_such_program_here"]),
        (["--sweep_file=nowhere.toml"], ["nowhere.toml"]),
        (["--gin_file=a.gin", "--gin.X='{teacher}'"], ["{teacher}", "no row 'teacher'"]),
        (
            ["--gin_file=gin/sft.gin", "--gin.TRAIN_STEP=3", "--print"],
            ["--gin.TRAIN_STEP: no such macro in the gin files (did you mean 'TRAIN_STEPS'?)"],
        ),
        (["--gin_file=gin/sft.gin", "--grid=SEED=1,2", "--print"], ["--gin.SEED: no such macro"]),
    ],
)
def test_wrong_flags_end_with_one_line(sweep, flags, words):
    assert_usage_error(sweep(*flags), *words)
    assert sweep.calls() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows = 3", ["[rows.NAME]"]),
        ("[rows.a", ["not TOML"]),
        ("[row.a]\ngin_file = 'x'", ["'row'", "rows"]),
        ("[rows.a]\nmacros.X = 1", ["row 'a'", "gin_file"]),
        ("[rows.a]\ngin_file = 'x'\nmacro.X = 1", ["'macro'", "macros"]),
        ("[rows.a]\ngin_file = 'x'\ncommand = 'tran'", ["'tran'", "train"]),
        ("[rows.'a b']\ngin_file = 'x'", ["'a b'"]),
        ("[rows.a]\ngin_file = 'gin/gkd.gin'\nmacros.K = 1", ["--gin.K: no such macro"]),
        ("[rows.a]\ngin_file = 'x'\naxes.X = 1", ["axis 'X'", "list"]),
        ("[rows.a]\ngin_file = 'x'\naxes.X = [{ Y = 1 }]", ["axis 'X'", "name"]),
        ("[rows.a]\ngin_file = 'x'\nmacros.X = 2020-01-01", ["X", "2020"]),
        (
            "[rows.a]\ngin_file = 'x'\ncommand = 'infer'\nmacros.OUTPUT = 'x'",
            ["row 'a' sets OUTPUT, which the sweep sets itself"],
        ),
        (
            "[axes]\nS = [0, 1]\n[rows.a]\ngin_file = 'x'\naxes.T = [{ name = 'b', S = 3 }]",
            ["'T' and 'S' both set S"],
        ),
        ("[rows.a]\ngin_file = 'x'\nmacros.X = \"'{b}'\"", ["row 'a'", "no row 'b'"]),
        (
            "gin_file = 'x'\n[rows.a]\nmacros.X = \"'{b}'\"\n[rows.b]\nmacros.X = \"'{a}'\"",
            ["circle", "a -> b -> a"],
        ),
        (
            "gin_file = 'x'\n[rows.a]\naxes.S = [0, 1]\n[rows.b]\nmacros.X = \"'{a}'\"",
            ["row 'b'", "{a}", "S"],
        ),
        (
            "gin_file = 'x'\n[rows.a]\naxes.S = [0]\n"
            "[rows.b]\naxes.S = [0, 1]\nmacros.X = \"'{a}'\"",
            ["row 'b'", "{a}", "S=1"],
        ),
    ],
)
def test_wrong_sweep_files_end_with_one_line(sweep, text, words):
    assert_usage_error(sweep(sweep.write(text)), *words)


@pytest.mark.parametrize("name", ["gin/sweeps/arithmetic.toml", "sweeps/arithmetic"])
def test_our_sweep_files_are_found_from_any_folder_as_gin_files_are(sweep, name, monkeypatch):
    monkeypatch.chdir(sweep.folder)
    result = sweep(f"--sweep_file={name}", "--rows=teacher", "--print")
    assert result.returncode == 0, result.stderr
    files = re.findall(r"--gin_file=(\S+)", result.stdout)
    assert len(files) == 2
    assert {recipes.find(file, ".gin") for file in files} == {str(ROOT / file) for file in files}


def test_the_arithmetic_study_has_every_method(sweep):
    result = sweep(f"--sweep_file={ARITHMETIC}", "--print", "--grid=RANDOM_SEED=0")
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line)[3:] for line in result.stdout.splitlines()]
    by_name = {}
    for command in commands:
        files = [text.removeprefix("--gin_file=") for text in command if "gin_file" in text]
        assert all((ROOT / file).is_file() for file in files), files
        flags = dict(text.removeprefix("--gin.").split("=", 1) for text in command[1:])
        outputs = [flags[name] for name in ("MODEL_DIR", "OUTPUT", "OUTPUT_DIR") if name in flags]
        folder = pathlib.Path(outputs[0].strip("'"))
        by_name[(folder.parent if folder.suffix == ".jsonl" else folder).name] = flags
    assert len(by_name) == len(commands)
    seed = "RANDOM_SEED=0"
    jsd = by_name[f"on_policy_gkd-divergence=jsd_0.9-{seed}"]
    assert (jsd["DIVERGENCE"], jsd["BETA"], jsd["ON_POLICY_FRACTION"]) == (
        "@divergences.jsd",
        "0.9",
        "1.0",
    )
    fractions = {
        flags["NUM_EXAMPLES"] for name, flags in by_name.items() if name.startswith("data_fraction")
    }
    assert fractions == {"250", "1000", "10000", "50000"}
    # Learning rates are chosen on examples that the other rows do not report.
    rates = [name for name in by_name if name.startswith("rate")]
    assert len(rates) == 3 + 3 * 5 * 3
    assert all(by_name[name]["EVAL_SPLIT"] == "'validation'" for name in rates)
    others = set(by_name) - set(rates)
    assert not any("EVAL_SPLIT" in by_name[name] for name in others)
    assert by_name[f"f_distill-{seed}"]["DIVERGENCE"] == "@divergences.total_variation"
    student, teacher = f"'{sweep.output}/student'", f"'{sweep.output}/teacher'"
    sampled = by_name[f"sampled_on_policy-divergence=jsd_0.9-{seed}"]
    assert sampled["CHECKPOINT"] == f"'{sweep.output}/on_policy_gkd-divergence=jsd_0.9-{seed}'"
    distilled = [name for name in by_name if name.startswith(("on_policy", "mixed", "lambda"))]
    assert len(distilled) == 5 + 4 + 8
    for name in [*distilled, f"imitkd-{seed}", f"supervised_kd-{seed}"]:
        assert by_name[name]["STUDENT_CHECKPOINT"] == student
        assert by_name[name]["TEACHER_CHECKPOINT"] == teacher
