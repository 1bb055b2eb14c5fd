"""Times each phase of a training step on this machine.

    gkd-jax bench --gin_file=gin/bench/config1.gin --json

The functions that `train` jits run on random weights and random ids. Inputs have no padding and
samples never end with EOS, so that every run does the same work. The result is one JSON object:

    sample_ms    time in which the student draws its samples
    score_ms     time of the teacher's logits alone, which a training step computes in the update
    update_ms    time of the update: teacher, divergence, gradient and optimizer
    step_ms      time of sampling and update, one after the other
                 (a method that never samples has neither sample_ms nor step_ms)
    compile_s    time to trace and compile all phases, without the persistent cache
    gemm_gflops  GFLOP/s of a large matrix product in the compute dtype, taken as this machine's
                 peak
    *_gflop      FLOPs of a phase's matrix products on one device, in 10^9
    *_of_peak    rate of the phase (its FLOPs over its time) as a share of gemm_gflops
    copy_gb_per_s          bandwidth of the memory: GB read and written per second by a large copy
    *_gb                   bytes that a phase's program moves through memory, in 10^9, as counted in
                           the compiled program; caches may save some of them
    sample_least_gb        bytes that sampling cannot do without: for each token, the weights and
                           the KV cache as far as it is written
    sample_of_bandwidth    rate of sampling (sample_least_gb over its time) as a share of
                           copy_gb_per_s; not with several accelerators, since each of them
                           has a memory of its own and the bytes are those of all

Sampling is also timed beside its plain loop (all rows to the last token, the whole cache at each),
with answers of full length or, where MEAN_LENGTH is set, of geometric lengths:

    sample_tokens_per_s, sample_plain_tokens_per_s      tokens of the answers over all runs' time
    sample_differing_rows                               rows whose tokens differ between the loops
    sample_compile_s, sample_plain_compile_s            time to trace and compile each of them
    sample_temporary_mb, sample_plain_temporary_mb      memory that each needs beside its arguments
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import resource
import time
import timeit
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import gkd
from gkd_jax.batch import Batch
from gkd_jax.gkd import TrainState
from gkd_jax.input import data
from gkd_jax.models import lm
from gkd_jax.planning import bench_sampling, hlo, hlo_text
from gkd_jax.storage.pretrained import initial_params
from gkd_jax.training import program, teachers, throughput, vocabulary_size
from gkd_jax.training.recipe import Recipe


_WARMUP_RUNS = 2


def bench(
    recipe: Recipe,
    *,
    runs: int = 20,
    mean_length: int | float | None = None,
    as_json: bool = False,
    dry_run: bool = False,
) -> None:
    """Times the phases of a step and prints the medians.

    The step is an on-policy one where the method has such steps.

    Args:
        recipe: the recipe of the run. If it has several batch shapes, the largest is timed.
        runs: the number of timed runs of each phase, after two warm-up runs.
        mean_length: the mean of the answers' geometric lengths; then sampling alone is timed, the
            two loops. None times all phases, with answers of full length.
        as_json: print one line of JSON instead of the table.
        dry_run: check everything, but compile and time nothing.

    Raises:
        ValueError: for a method with a reward or with mixed batches, or a recipe that
            `program.build` refuses.
    """
    method = recipe.method
    _check(method, mean_length)
    jax.config.update("jax_enable_compilation_cache", False)
    sampling = dataclasses.replace(method.sampling, eos_ids=())
    recipe = dataclasses.replace(recipe, method=dataclasses.replace(method, sampling=sampling))
    built = program.build(recipe, vocabulary_size.num_pieces_of(recipe))
    if dry_run:
        return
    models = _random_models(built)
    sampled: dict[str, Any] = {}
    if method.uses_samples():  # before the updates, which consume the state
        batch = _random_batch(built)
        sampled = bench_sampling.measure(built, models[0].params, batch, runs, mean_length)
    timed = {} if mean_length else _measure(built, models, runs)
    memory = {
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        **throughput.device_memory(),
    }
    if timed:
        timed |= _shares(timed, built.models.student.dtype)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "dtype": built.models.student.dtype,
        "runs": runs,
        **{name: round(value, 3) for name, value in (timed | sampled).items()},
        **memory,
        "student_params": lm.num_params(built.state.params),
    }
    if as_json:
        print(json.dumps(report), flush=True)
        return
    width = max(map(len, report)) + 2
    print("\n".join(f"{name:<{width}}{value}" for name, value in report.items()), flush=True)


def _check(method: gkd.GKDConfig, mean_length: int | float | None) -> None:
    """Raises ValueError for a method or a mean length that `bench` does not time."""
    if method.rl is not None or method.mixing != "step":
        raise ValueError(
            "bench times steps without a reward and batches of one kind: no RL and MIXING='step', "
            f"got {'RL' if method.rl else 'no RL'} and {method.mixing!r}"
        )
    is_mean = isinstance(mean_length, int | float) and mean_length >= 1
    if mean_length is not None and not (is_mean and method.uses_samples()):
        raise ValueError(
            "MEAN_LENGTH is that of samples: expected a number of at least 1 and a method that "
            f"samples, got {mean_length!r} and on_policy_fraction={method.on_policy_fraction}"
        )


def _measure(
    built: program.Program, models: tuple[TrainState, lm.Params | None], runs: int
) -> dict[str, float]:
    functions = program.step_functions(built)
    functions.pop("update_dataset", None)  # where it exists, "update" is that of on-policy steps
    began = time.perf_counter()
    compiled = {
        name: function.lower(*arguments).compile()
        for name, (function, arguments) in functions.items()
    }
    found = {"compile_s": time.perf_counter() - began}
    times = _time_phases(built, compiled, models, runs)
    found |= {f"{name}_ms": float(np.median(values)) * 1e3 for name, values in times.items()}
    for name, program_of_phase in compiled.items():
        counted = hlo.summary(hlo_text.parse(program_of_phase.as_text()))
        found[f"{name}_gflop"] = counted["flops"] / 1e9
        found[f"{name}_gb"] = counted["traffic_bytes"] / 1e9
    if "sample" in compiled:
        found["sample_least_gb"] = bench_sampling.least_bytes(built) / 1e9
    return found


def _shares(timed: Mapping[str, float], dtype: str) -> dict[str, float]:
    """Returns the rates of this machine, and those of the phases as shares of them."""
    found = {"gemm_gflops": gemm_gflops(dtype), "copy_gb_per_s": copy_gb_per_s()}
    for name in ("sample", "score", "update"):
        if f"{name}_ms" in timed:
            rate = timed[f"{name}_gflop"] / timed[f"{name}_ms"] * 1e3
            found[f"{name}_of_peak"] = rate / found["gemm_gflops"]
    if "sample_ms" in timed and (jax.default_backend() == "cpu" or jax.device_count() == 1):
        rate = timed["sample_least_gb"] / timed["sample_ms"] * 1e3
        found["sample_of_bandwidth"] = rate / found["copy_gb_per_s"]
    return found


def _time_phases(
    built: program.Program,
    compiled: Mapping[str, Callable[..., Any]],
    models: tuple[TrainState, lm.Params | None],
    runs: int,
) -> dict[str, list[float]]:
    """Returns the seconds of each run of each phase.

    The phases take turns, so that other load on the machine slows all of them alike.
    """
    state, teacher = models
    batch, key = _random_batch(built), jax.random.key(0)
    drawn = compiled["sample"](state.params, batch, key)[0] if "sample" in compiled else batch

    def sample(state):
        jax.block_until_ready(compiled["sample"](state.params, batch, key))
        return state

    def score(state):
        now = gkd.teacher_now(built.learner, state, teacher)
        jax.block_until_ready(compiled["score"](now, drawn))
        return state

    def update(state):
        return jax.block_until_ready(compiled["update"](state, teacher, drawn, key, None))[0]

    def step(state):
        rows, _ = compiled["sample"](state.params, batch, key)
        return jax.block_until_ready(compiled["update"](state, teacher, rows, key, None))[0]

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


def _random_models(built: program.Program) -> tuple[TrainState, lm.Params | None]:
    """Returns a student with its optimizer's state, and a teacher, both with random weights."""
    models = {
        name: dataclasses.replace(model, checkpoint=None, size=model.size or "tiny")
        for name, model in built.recipe.models.items()
    }
    recipe = built.recipe.with_models(models)
    params = initial_params(
        recipe.student, built.models.student, built.state.params, jax.random.key(0), "student"
    )
    state = program.initial_state(built, params)
    return state, teachers.initial_params(recipe, built.learner, built.teacher)


def _random_batch(built: program.Program) -> Batch:
    """Returns a batch of random ids without padding, placed on the mesh."""
    generator = np.random.Generator(np.random.Philox(0))
    shape = built.batch(built.recipe.data.batch_size, built.recipe.data.shapes()[-1])

    def ids(where):
        return generator.integers(3, built.models.num_pieces, where.shape).astype(np.int32)

    weights = np.ones(shape.weights.shape, np.float32)
    lengths = np.full(shape.inputs.shape[:1], shape.inputs.shape[1], np.int32)
    batch = Batch(ids(shape.inputs), ids(shape.targets), weights, input_lengths=lengths)
    if shape.teacher_inputs is not None:
        length = np.full_like(lengths, shape.teacher_inputs.shape[1])
        batch = batch._replace(
            teacher_inputs=ids(shape.teacher_inputs), teacher_input_lengths=length
        )
    return data.place(batch, built.mesh)


def gemm_gflops(dtype: str) -> float:
    """Returns the highest rate, in GFLOP/s, of a product of two square random matrices.

    The operands have the given dtype and the result is float32. The matrices are so large that the
    start of a program takes a negligible share of the time.
    """
    size = 2048 if jax.default_backend() == "cpu" else 16_384
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32))
    return 2 * size**3 / _fastest(lambda: product(x, y)) / 1e9


def copy_gb_per_s() -> float:
    """Returns the bandwidth of the memory, in GB/s: the bytes that a large copy reads and writes.

    The array that is copied has 256 MiB on CPUs and 4 GiB on accelerators.
    """
    num_bytes = 2**28 if jax.default_backend() == "cpu" else 2**32
    x = jnp.arange(num_bytes // 4, dtype=jnp.uint32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * num_bytes / _fastest(lambda: copy(x)) / 1e9


def _fastest(function: Callable[[], jax.Array]) -> float:
    """Returns the seconds of the fastest of eight calls, of which the first one compiles."""
    return min(timeit.repeat(lambda: function().block_until_ready(), number=1, repeat=8))
