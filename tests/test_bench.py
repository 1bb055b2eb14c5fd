"""What `bench` prints, and the FLOPs that it counts, against formulas by hand."""

import json

import jax
from jax import lax
import jax.numpy as jnp
import pytest
from small_runs import options, small

from gkd_jax import bench, divergences, gkd, pretrained


def given(**more):
    found = options("", steps=1, fraction=1.0, divergence=divergences.jsd, **more)
    found.pop("model_dir")
    return {**found, "teacher": pretrained.Model(architecture=small, size="tiny")}


def test_every_phase_is_timed_and_a_step_is_not_less_than_its_parts(capsys):
    bench.run(**given(), runs=3, as_json=True)
    found = json.loads(capsys.readouterr().out)
    for name in ("sample_ms", "score_ms", "update_ms", "step_ms", "compile_s", "peak_memory_mb"):
        assert found[name] > 0, name
    assert found["runs"] == 3
    # 32 tokens in full: nothing ended early, and no phase was left out of the step.
    assert found["update_gflop"] > found["score_gflop"] > 0
    assert found["student_params"] > 1000


def test_a_method_that_never_samples_is_refused():
    method = gkd.GKDConfig(on_policy_fraction=0.0, divergence=divergences.jsd)
    with pytest.raises(ValueError, match="ON_POLICY_FRACTION must be above 0"):
        bench.run(**{**given(), "method": method}, runs=1)


def test_flops_of_products_in_loops_and_gradients():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    one = 2 * 4 * 8 * 8

    def scanned(x):
        return lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    def looped(x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, scanned(c[1])), (0, x))

    def flops(function, *arguments):
        return bench.matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr, 3)

    assert flops(scanned, x) == 5 * one
    assert flops(looped, x) == 3 * 5 * one
    assert flops(jax.grad(lambda w: jnp.sum((x @ w) ** 2)), w) == 2 * one
    assert flops(jax.jit(jax.checkpoint(lambda x: x @ w)), x) == one
