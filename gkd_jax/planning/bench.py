"""How long each phase of a step takes on this machine.

    gkd-jax bench --gin_file=gin/bench/config1.gin --json

The very functions that `train` jits, on random weights and random ids: full inputs without
padding, and samples without EOS, so that every run does the same work. One JSON object:

    sample_ms    the student draws its sequences
    score_ms     the teacher's logits of them, alone; a run has this inside the update
    update_ms    teacher, divergence, gradient and optimizer
    step_ms      sample and update, one after the other
                 (of a method that never samples the update is the step: no sample_ms, no step_ms)
    compile_s    tracing and compiling all of them, without the persistent cache
    gemm_gflops  a large matrix product of the compute dtype: this machine's peak
    *_gflop      matrix products of each phase on one device; with them its share of the peak
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.batch import Batch
from gkd_jax.gkd import TrainState
from gkd_jax.input import data
from gkd_jax.models import lm
from gkd_jax.planning import hlo
from gkd_jax.storage.pretrained import initial_params
from gkd_jax.training import program, sizes, train_state
from gkd_jax.training.recipe import Recipe


_WARMUP_RUNS = 2


def bench(recipe: Recipe, *, runs: int = 20, as_json: bool = False, dry_run: bool = False) -> None:
    """Times the phases of a step, on-policy where the method has such steps, and prints them.

    Args:
        recipe: of the run; of several shapes of batch, the largest is timed.
        runs: of each phase, after two that do not count; medians are printed.
        as_json: one line of JSON instead of the table.
        dry_run: check everything, compile and time nothing.

    Raises:
        ValueError: for a method with a reward or mixed batches, or what `program.build` refuses.
    """
    method = recipe.method
    if method.rl is not None or method.mixing != "step":
        raise ValueError(
            "bench times steps without a reward and batches of one kind: no RL and MIXING='step', "
            f"got {'RL' if method.rl else 'no RL'} and {method.mixing!r}"
        )
    jax.config.update("jax_enable_compilation_cache", False)
    sampling = dataclasses.replace(method.sampling, eos_ids=())
    recipe = dataclasses.replace(recipe, method=dataclasses.replace(method, sampling=sampling))
    built = program.build(recipe, sizes.num_pieces_of(recipe))
    if dry_run:
        print("dry run: all is well", file=sys.stderr)
        return
    timed = _measure(built, _random_models(built), runs)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "dtype": built.models.student.dtype,
        "runs": runs,
        **{name: round(value, 3) for name, value in timed.items()},
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "student_params": lm.num_params(built.state.params),
    }
    if as_json:
        print(json.dumps(report), flush=True)
        return
    print("\n".join(f"{name:<16}{value}" for name, value in report.items()), flush=True)


def _measure(
    built: program.Program,
    models: tuple[TrainState, lm.Params | None],
    runs: int,
) -> dict[str, float]:
    functions = program.phases(built)
    functions.pop("update_dataset", None)  # where there are on-policy steps, one is timed
    began = time.perf_counter()
    compiled = {
        name: function.lower(*arguments).compile()
        for name, (function, arguments) in functions.items()
    }
    found = {"compile_s": time.perf_counter() - began}
    times = _time_phases(built, compiled, models, runs)
    found |= {f"{name}_ms": float(np.median(values)) * 1e3 for name, values in times.items()}
    found["gemm_gflops"] = gemm_gflops(built.models.student.dtype)
    for name, program_of_phase in compiled.items():
        gflop = hlo.summary(hlo.parse(program_of_phase.as_text()))["flops"] / 1e9
        found[f"{name}_gflop"] = gflop
        found[f"{name}_of_peak"] = gflop / found[f"{name}_ms"] * 1e3 / found["gemm_gflops"]
    return found


def _time_phases(
    built: program.Program,
    compiled: Mapping[str, Callable[..., Any]],
    models: tuple[TrainState, lm.Params | None],
    runs: int,
) -> dict[str, list[float]]:
    """Seconds of each run of each phase. All take turns: what slows the machine slows them all."""
    state, teacher = models
    batch, key = _random_batch(built), jax.random.key(0)
    drawn = compiled["sample"](state.params, batch, key)[0] if "sample" in compiled else batch

    def sample(state):
        jax.block_until_ready(compiled["sample"](state.params, batch, key))
        return state

    def score(state):
        jax.block_until_ready(compiled["score"](teacher, drawn))
        return state

    def update(state):
        return jax.block_until_ready(compiled["update"](state, teacher, drawn, key))[0]

    def step(state):
        rows, _ = compiled["sample"](state.params, batch, key)
        return jax.block_until_ready(compiled["update"](state, teacher, rows, key))[0]

    phases = {"sample": sample, "score": score, "update": update}
    phases = {name: phase for name, phase in phases.items() if name in compiled}
    if "sample" in compiled:
        phases["step"] = step
    times: dict[str, list[float]] = {name: [] for name in phases}
    for turn in range(_WARMUP_RUNS + runs):
        for name, phase in phases.items():
            began = time.perf_counter()
            state = phase(state)
            if turn >= _WARMUP_RUNS:
                times[name].append(time.perf_counter() - began)
    return times


def _random_models(
    built: program.Program,
) -> tuple[TrainState, lm.Params | None]:
    def random(model, config, target, seed):
        model = dataclasses.replace(model, checkpoint=None, size=model.size or "tiny")
        return initial_params(model, config, target, jax.random.key(seed), "bench")

    teacher = built.recipe.teacher
    create = functools.partial(train_state.create, optimizer=built.learner.optimizer)
    params = random(built.recipe.student, built.models.student, built.state.params, 0)
    state = jax.jit(create, out_shardings=program.shardings_of(built.state))(params)
    if teacher is None:
        return state, None
    return state, random(teacher, built.models.teacher, built.teacher, 1)


def _random_batch(built: program.Program) -> Batch:
    generator = np.random.Generator(np.random.Philox(0))
    shape = built.batch(built.recipe.data.batch_size, built.recipe.data.shapes()[-1])

    def ids(where):
        return generator.integers(3, built.models.num_pieces, where.shape).astype(np.int32)

    weights = np.ones(shape.weights.shape, np.float32)
    lengths = np.full(shape.inputs.shape[:1], shape.inputs.shape[1], np.int32)
    batch = Batch(ids(shape.inputs), ids(shape.targets), weights, input_lengths=lengths)
    return data.place(batch, built.mesh)


def gemm_gflops(dtype: str, size: int = 2048, runs: int = 7) -> float:
    """The best of some products of two square matrices with float32 results; GFLOP/s."""
    x, y = (jnp.full((size, size), 1.0 / size, dtype) for _ in range(2))
    product = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32))
    product(x, y).block_until_ready()
    best = min(_seconds(lambda: product(x, y).block_until_ready()) for _ in range(runs))
    return 2 * size**3 / best / 1e9


def _seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
