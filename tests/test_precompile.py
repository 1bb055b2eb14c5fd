"""The counts of `precompile` equal formulas by hand and the program that `train` runs."""

import ast
import importlib.util
import json

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
from small_runs import small

import gin
from gkd_jax import convert, divergences, gkd, main, rl, sharding
from gkd_jax.input import data
from gkd_jax.models import lm, t5
from gkd_jax.planning import (
    analysis,
    hlo,
    hlo_loops,
    hlo_text,
    precompile,
    roofline,
    topologies,
)
from gkd_jax.storage import pretrained
import gkd_jax.tasks.arithmetic  # noqa: F401
from gkd_jax.training import optimizers, program, train, vocabulary_size
from gkd_jax.training.recipe import Recipe, TrainConfig


SOURCE, TARGET, BATCH = 48, 32, 8
F32 = jax.ShapeDtypeStruct
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'gkd_jax[tpu]'"
)


def options(**more):
    fields = {
        "student": pretrained.ModelConfig(architecture=small, size="tiny"),
        "teacher": pretrained.ModelConfig(architecture=small, size="tiny"),
        "data": data.DataConfig(
            task="arithmetic",
            feature_lengths={"inputs": SOURCE, "targets": TARGET},
            batch_size=BATCH,
        ),
        "method": gkd.GKDConfig(on_policy_fraction=0.5, divergence=divergences.forward_kl),
        "optimizer": optimizers.Adafactor(),
        "schedule": optimizers.Linear(learning_rate=0.02),
        "train": TrainConfig(train_steps=1),
        "mesh": sharding.MeshConfig(data=2, fsdp=2, tensor=2),
        **more,
    }
    return Recipe(**fields)


def build(recipe):
    return program.build(recipe, vocabulary_size.num_pieces_of(recipe))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, folder):
    """One cache for all tests, so that the step is compiled once."""
    monkeypatch.setenv("GKD_JAX_COMPILATION_CACHE", str(folder))
    gin.clear_config()
    yield
    gin.clear_config()


def test_a_checkpoint_in_a_folder_tells_its_rows_when_the_texts_are_absent(tmp_path):
    config = t5.t5_1_1("32x2", vocab_size=256)
    convert.write_hf(tmp_path / "model", config, lm.init(config, jax.random.key(0)))
    student = pretrained.ModelConfig(checkpoint=str(tmp_path / "model"))
    absent = {"task": str(tmp_path / "absent.jsonl"), "batch_size": BATCH}
    texts = data.DataConfig(feature_lengths={"inputs": SOURCE, "targets": TARGET}, **absent)
    recipe = options(student=student, teacher=student, data=texts)
    assert vocabulary_size.num_pieces_of(recipe) == 256


def report(capsys, recipe, topology="cpu"):
    capsys.readouterr()
    precompile.precompile(recipe, topology, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def costs(function, *arguments):
    return hlo.costs(hlo_text.parse(jax.jit(function).lower(*arguments).compile().as_text()))


# The program --------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_program_that_train_runs(capsys):
    assert train.build is program.build
    assert train.start_compiling is program.start_compiling
    given = options()
    steps = program.compile_steps(build(given))[SOURCE, TARGET]
    found = report(capsys, given)
    for name, step in (("sample", steps.sample), ("update", steps.update_samples)):
        memory = step.memory_analysis()
        phase = found["phases"][name]
        assert phase["argument_bytes"] == memory.argument_size_in_bytes > 0, name
        assert phase["temporary_bytes"] == memory.temp_size_in_bytes > 0, name
        assert phase["output_bytes"] == memory.output_size_in_bytes, name
        parts = phase["argument_bytes"] + phase["output_bytes"] + phase["temporary_bytes"]
        assert phase["peak_bytes"] == parts - memory.alias_size_in_bytes, name
    assert found["fits"]
    assert found["num_devices"] == 8
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("method", "phases"),
    [
        (gkd.GKDConfig(on_policy_fraction=0.0, divergence=None), ["update"]),
        (
            gkd.GKDConfig(on_policy_fraction=0.5, num_samples=2),
            ["sample", "score", "update", "update_dataset"],
        ),
        (
            gkd.GKDConfig(rl=rl.RLConfig(reward=lambda *_: np.zeros(8), alpha=0.5)),
            ["sample", "score", "update"],
        ),
    ],
)
def test_phases_are_the_programs_of_compile_steps(monkeypatch, method, phases):
    given = options(method=method)
    built = build(given)
    found = program.step_functions(built)
    assert list(found) == phases
    ours = [function.lower(*arguments).as_text() for function, arguments in found.values()]
    theirs = []

    class Lowered(type(built.update.lower(*found["update"][1]))):
        pass

    def keep(lowered, *_, **__):
        theirs.append(lowered.as_text())

    monkeypatch.setattr(Lowered.__base__, "compile", keep)
    program.compile_steps(built)
    assert theirs
    assert set(theirs) == set(ours) - (
        {ours[phases.index("score")]} if "score" in phases else set()
    )


def test_analyses_are_cached_by_program(monkeypatch, tmp_path):
    cache = tmp_path / "precompile"
    monkeypatch.setenv("GKD_JAX_COMPILATION_CACHE", str(tmp_path))
    function = jax.jit(lambda x: x @ x)
    first = analysis.analyse(function, (F32((8, 8), jnp.float32),))
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(hlo_text, "parse", lambda text: pytest.fail("compiled again"))
        again = analysis.analyse(function, (F32((8, 8), jnp.float32),))
    assert again == json.loads(json.dumps(first))
    assert analysis.analyse(function, (F32((9, 9), jnp.float32),))["flops"] == 2 * 9**3
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setenv("GKD_JAX_COMPILATION_CACHE", "")
    analysis.analyse(function, (F32((7, 7), jnp.float32),))
    assert len(list(cache.iterdir())) == 2


# FLOPs and traffic --------------------------------------------------------------------------------


def test_flops_of_nested_scans_count_every_turn():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, ws):
        x, _ = lax.scan(inner, x, ws)
        return x @ ws[0], None

    found = costs(
        lambda x, ws: lax.scan(outer, x, ws)[0],
        F32((32, 64), jnp.float32),
        F32((5, 7, 64, 64), jnp.float32),
    )
    one = 2 * 32 * 64 * 64
    assert found["5 > 7"].flops == 5 * 7 * one
    assert found["5"].flops == 5 * one
    assert sum(cost.flops for cost in found.values()) == 5 * 8 * one


def test_flops_of_products_in_loops_and_gradients():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    one = 2 * 4 * 8 * 8

    def scanned(x, w):
        return lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    def looped(x, w):
        def turn(carry):
            return carry[0] + 1, scanned(carry[1], w)

        return lax.while_loop(lambda carry: carry[0] < 3, turn, (0, x))

    def flops(function):
        return sum(cost.flops for cost in costs(function, x, w).values())

    assert flops(scanned) == 5 * one
    assert flops(looped) == 3 * 5 * one
    assert flops(jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), argnums=1)) == 2 * one
    assert flops(jax.checkpoint(lambda x, w: x @ w)) == one


def test_a_while_loop_counts_as_if_it_never_stopped_early():
    def body(loop):
        return loop[0] + 1, jnp.tanh(loop[1] @ loop[1])

    found = costs(
        lambda x: lax.while_loop(
            lambda loop: (loop[0] < 11) & ~jnp.all(loop[1] > 0.5), body, (jnp.zeros((), int), x)
        )[1],
        F32((16, 16), jnp.float32),
    )
    assert sum(cost.flops for cost in found.values()) == 11 * 2 * 16**3


def test_flops_of_the_teacher_against_the_formula():
    teacher = pretrained.ModelConfig(architecture=small, size="tiny", scan_unroll=1)
    given = options(teacher=teacher, mesh=sharding.MeshConfig(data=8))
    built = build(given)
    found = analysis.analyse(*program.step_functions(built)["score"])
    config = built.models.teacher
    assert config is not None
    inner, wide, mlp = config.num_heads * config.head_dim, config.d_model, config.d_ff
    s, t = SOURCE, TARGET
    encoder = s * (4 * wide * inner + 3 * wide * mlp) + 2 * s * s * inner
    decoder = t * (6 * wide * inner + 3 * wide * mlp) + 2 * t * t * inner
    decoder += s * 2 * wide * inner + 2 * t * s * inner
    total = 2 * (encoder + decoder + t * wide * config.vocab_size)
    assert found["flops"] == total * BATCH / 8


def test_traffic_of_a_scan_reads_each_slice_once():
    found = costs(
        lambda x, ws: lax.scan(lambda x, w: (x * w, None), x, ws)[0],
        F32((1024,), jnp.float32),
        F32((100, 1024), jnp.float32),
    )
    moved = sum(cost.traffic for cost in found.values())
    # At least a slice of ws in and x out, a turn; at most some copies of both, never all of ws.
    assert 100 * 2 * 4096 <= moved <= 100 * 8 * 4096


# Text as TPUs have it: no trip count noted, meshes in groups, matrix products as convolutions.
TPU_TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %b.1 = f32[]{:T(128)} parameter(1)
  ROOT %c.1 = f32[]{:T(128)} add(%a.1, %b.1)
}

%all-reduce-scatter (p.2: f32[64,32]) -> f32[16,32] {
  %p.2 = f32[64,32]{1,0:T(8,128)} parameter(0)
  %all-reduce.2 = f32[64,32]{1,0:T(8,128)} all-reduce(%p.2), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, to_apply=%add
  %zero.2 = s32[] constant(0)
  ROOT %slice.2 = f32[16,32]{1,0:T(8,128)} dynamic-slice(%all-reduce.2, %zero.2, %zero.2), \
dynamic_slice_sizes={16,32}
}

%body (p.3: (s32[], bf16[4,6,32,8], f32[64,32])) -> (s32[], bf16[4,6,32,8], f32[64,32]) {
  %p.3 = (s32[]{:T(128)}, bf16[4,6,32,8]{3,2,1,0:T(8,128)(2,1)}, f32[64,32]{1,0}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  %x.3 = bf16[4,6,32,8]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%p.3), index=1
  %g.3 = f32[64,32]{1,0} get-tuple-element(%p.3), index=2
  %one.3 = s32[] constant(1)
  %next.3 = s32[]{:T(128)} add(%i.3, %one.3)
  %scores.3 = f32[4,6,32,32]{2,3,1,0:T(8,128)S(1)} convolution(%x.3, %x.3), \
window={size=4x6 stride=3x5 lhs_dilate=4x6}, dim_labels=01bf_01oi->01bf
  %scattered.3 = f32[16,32]{1,0:T(8,128)} fusion(%g.3), kind=kCustom, calls=%all-reduce-scatter
  ROOT %t.3 = (s32[]{:T(128)}, bf16[4,6,32,8]{3,2,1,0}, f32[64,32]{1,0}) \
tuple(%next.3, %x.3, %g.3)
}

%cond (p.4: (s32[], bf16[4,6,32,8], f32[64,32])) -> pred[] {
  %bound.4 = s32[]{:T(128)} constant(24)
  %p.4 = (s32[]{:T(128)}, bf16[4,6,32,8]{3,2,1,0}, f32[64,32]{1,0}) parameter(0)
  %i.4 = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  ROOT %lt.4 = pred[]{:T(512)} compare(%i.4, %bound.4), direction=LT
}

ENTRY %main (x: bf16[4,6,32,8], g: f32[64,32]) -> bf16[4,6,32,8] {
  %x = bf16[4,6,32,8]{3,2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="params['x']"}
  %g = f32[64,32]{1,0} parameter(1), metadata={op_name="params['g']"}
  %zero = s32[] constant(0)
  %t = (s32[]{:T(128)}, bf16[4,6,32,8]{3,2,1,0}, f32[64,32]{1,0}) tuple(%zero, %x, %g)
  %loop = (s32[]{:T(128)}, bf16[4,6,32,8]{3,2,1,0}, f32[64,32]{1,0}) while(%t), \
condition=%cond, body=%body
  ROOT %out = bf16[4,6,32,8]{3,2,1,0} get-tuple-element(%loop), index=1
}
"""


def test_text_of_a_tpu_program():
    module = hlo_text.parse(TPU_TEXT.replace("\\\n", ""))
    cost = hlo.costs(module)["24"]
    # A product of [4, 6, 32, 8] and itself over the last axis, batched over the first two.
    assert cost.flops == 24 * 2 * 4 * 6 * 32 * 32 * 8
    scattered = 64 * 32 * 4
    assert cost.collectives == {
        ("reduce-scatter", 4): hlo.Collective("reduce-scatter", 4, 24.0, 24.0 * scattered)
    }
    # Scores stay on the chip: x twice, g once, its sixteenth rows, and the counters.
    slices = 2 * (4 * 6 * 32 * 8 * 2) + scattered + 16 * 32 * 4
    assert 24 * slices <= cost.traffic <= 24 * (slices + 64)
    assert analysis.largest_arrays(module)[0] == (
        "scores.3 f32[4,6,32,32]",
        4 * 6 * 32 * 32 * 4,
    )


def test_a_loop_that_xla_has_unrolled_turns_half_as_often():
    """Its counter goes up by two, as those of windowed products of an optimized TPU program do."""
    by_two = TPU_TEXT.replace("%one.3 = s32[] constant(1)", "%one.3 = s32[] constant(2)")
    text = by_two.replace("\\\n", "")
    cost = hlo.costs(hlo_text.parse(text))["12"]
    assert cost.flops == 12 * 2 * 4 * 6 * 32 * 32 * 8


# The conditions of decode loops of at most 24 tokens, which stop once 64 rows are left. The TPU's
# compares a number of rows from all devices, and the CPU's has everything in a fusion.
TPU_DECODE_CONDITION = """
%sum (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %a.b = s32[] add(%a, %b)
}

%count (g: f32[64,32]) -> s32[] {
  %g = f32[64,32]{1,0} parameter(0)
  %counted = s32[64,32]{1,0} convert(%g)
  %none = s32[] constant(0)
  ROOT %rows = s32[] reduce(%counted, %none), dimensions={0,1}, to_apply=%sum
}

%cond (p.4: (s32[], bf16[4,6,32,8], f32[64,32])) -> pred[] {
  %half.4 = s32[]{:T(128)} constant(64)
  %bound.4 = s32[]{:T(128)} constant(24)
  %p.4 = (s32[]{:T(128)}, bf16[4,6,32,8]{3,2,1,0}, f32[64,32]{1,0}) parameter(0)
  %g.4 = f32[64,32]{1,0} get-tuple-element(%p.4), index=2
  %own.4 = s32[]{:T(128)} fusion(%g.4), kind=kLoop, calls=%count
  %most.4 = s32[]{:T(128)} all-reduce(%own.4), replica_groups={{0,1,2,3}}, to_apply=%sum
  %gt.4 = pred[]{:T(512)} compare(%most.4, %half.4), direction=GT
  %i.4 = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  %lt.4 = pred[]{:T(512)} compare(%i.4, %bound.4), direction=LT
  ROOT %and.4 = pred[]{:T(512)} and(%lt.4, %gt.4)
}
"""
CPU_DECODE_CONDITION = """
%test (i: s32[], rows: s32[], since: s32[], bound: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %rows = s32[] parameter(1)
  %bound = s32[] parameter(3)
  %since = s32[] parameter(2)
  %age = s32[] subtract(%i, %since)
  %lt = pred[] compare(%bound, %age), direction=GT
  %half = s32[] constant(64)
  %gt = pred[] compare(%rows, %half), direction=GT
  ROOT %and = pred[] and(%lt, %gt)
}

%cond (p.4: (s32[], bf16[4,6,32,8], f32[64,32])) -> pred[] {
  %bound.4 = s32[] constant(24)
  %since.4 = s32[] constant(0)
  %p.4 = (s32[], bf16[4,6,32,8]{3,2,1,0}, f32[64,32]{1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %g.4 = f32[64,32]{1,0} get-tuple-element(%p.4), index=2
  %rows.4 = s32[] reduce(%g.4), dimensions={0,1}, to_apply=%sum
  ROOT %test.4 = pred[] fusion(%i.4, %rows.4, %since.4, %bound.4), kind=kLoop, calls=%test
}
"""


@pytest.mark.parametrize("condition", [TPU_DECODE_CONDITION, CPU_DECODE_CONDITION])
def test_a_decode_loop_turns_once_for_each_token_however_many_rows_it_has(condition):
    before, after = TPU_TEXT.split("%cond (")
    text = before + condition.lstrip() + after[after.index("}") + 1 :]
    module = hlo_text.parse(text.replace("\\\n", ""))
    loop = module.computations["main"]["loop"]
    assert hlo_loops.trip_count(module, loop) == 24


def test_an_operand_under_another_name_is_read():
    """XLA may put a bitcast of an operand into a fusion of its own inside the fusion."""
    text = """HloModule m, num_partitions=1

%names (a: bf16[32,16]) -> bf16[32,16] {
  %a = bf16[32,16]{1,0} parameter(0)
  ROOT %same = bf16[32,16]{1,0} bitcast(%a)
}

%fused (x: bf16[8,32], y: bf16[32,16]) -> f32[8,16] {
  %x = bf16[8,32]{1,0} parameter(0)
  %y = bf16[32,16]{1,0} parameter(1)
  %inner = bf16[32,16]{1,0} fusion(%y), kind=kLoop, calls=%names
  ROOT %out = f32[8,16]{1,0} dot(%x, %inner), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[8,32], y: bf16[32,16]) -> f32[8,16] {
  %x = bf16[8,32]{1,0} parameter(0)
  %y = bf16[32,16]{1,0} parameter(1)
  ROOT %out = f32[8,16]{1,0} fusion(%x, %y), kind=kOutput, calls=%fused
}
"""
    summary = hlo.summary(hlo_text.parse(text))
    assert summary["traffic_bytes"] == 2 * (8 * 32 + 32 * 16) + 4 * 8 * 16
    assert summary["flops"] == 2 * 8 * 32 * 16


# Collectives --------------------------------------------------------------------------------------


def test_collectives_of_a_program_on_eight_devices():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    turns, rows = 3, 16

    def local(x):  # [rows, 128] on each device
        def turn(x, _):
            x = x + lax.psum(x, "fsdp")
            x = lax.ppermute(x, "data", [(0, 1), (1, 0)])
            return x, None

        x, _ = lax.scan(turn, x, None, length=turns)
        whole = lax.all_gather(x, "fsdp", tiled=True)
        part = lax.psum_scatter(whole, "data", tiled=True)
        return lax.all_to_all(part, "fsdp", 0, 0, tiled=True)

    spec = P(("data", "fsdp"))
    function = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = F32((8 * rows, 128), jnp.float32, sharding=NamedSharding(mesh, spec))
    found = costs(function, x)
    nbytes = rows * 128 * 4.0
    inside = {kind: (item.count, item.nbytes) for kind, item in found["3"].collectives.items()}
    assert inside == {
        ("all-reduce", 4): (turns, turns * nbytes),
        ("collective-permute", 8): (turns, turns * nbytes),
    }
    outside = {kind: (item.count, item.nbytes) for kind, item in found[""].collectives.items()}
    assert outside == {
        ("all-gather", 4): (1, 4 * nbytes),
        ("reduce-scatter", 2): (1, 4 * nbytes),
        ("all-to-all", 4): (1, 2 * nbytes),
    }
    # Rings: an all-reduce of n sends 2 (n - 1) / n, a gather or scatter (n - 1) / n.
    assert found["3"].collectives["all-reduce", 4].wire_bytes == 1.5 * turns * nbytes
    assert found[""].collectives["all-gather", 4].wire_bytes == 3 * nbytes


# (kind, in the decode loop) -> how many, of the two layers and 32 tokens of `options`. What the
# partitioner makes, counted once and looked at: a change of 20 % is to be looked at again.
GOLDEN = {
    ("data", "sample"): {("all-gather", False): 3, ("all-reduce", True): 32},  # has all ended?
    ("data", "score"): {},
    ("data", "update"): {("all-reduce", False): 2},  # the gradients together, and the sums
    ("fsdp", "sample"): {
        ("all-gather", False): 31,  # the weights, once
        ("all-to-all", False): 1,
        ("all-reduce", True): 32,
    },
    ("fsdp", "score"): {("all-gather", False): 28, ("all-to-all", False): 2},
    ("fsdp", "update"): {
        ("all-gather", False): 93,  # forward, backward, and the teacher's
        ("all-reduce", False): 46,
        ("all-to-all", False): 6,
    },
}


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_counts_of_collectives_are_those_that_were_looked_at(axis):
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, axis: 8}
    given = options(
        mesh=sharding.MeshConfig(**mesh),
        method=gkd.GKDConfig(on_policy_fraction=1.0, divergence=divergences.forward_kl),
    )
    built = build(given)
    for phase, (function, arguments) in program.step_functions(built).items():
        found: dict[tuple[str, bool], float] = {}
        for item in analysis.analyse(function, arguments)["collectives"]:
            key = (item["kind"], item["loop"] != "")
            found[key] = found.get(key, 0) + item["count"]
        assert found == pytest.approx(GOLDEN[axis, phase], rel=0.2), (axis, phase)


def test_the_gradient_of_a_position_bias_is_not_summed_over_devices_at_every_layer():
    """All all-reduces of an update together carry less than one bias of the encoder would."""
    lengths = {"inputs": 256, "targets": 8}
    given = options(
        data=data.DataConfig(task="arithmetic", feature_lengths=lengths, batch_size=16),
        mesh=sharding.MeshConfig(data=8),
        student=pretrained.ModelConfig(architecture=small, size="tiny", scan_unroll=1),
    )
    built = build(given)
    function, arguments = program.step_functions(built)["update"]
    found = analysis.analyse(function, arguments)["collectives"]
    sent = sum(item["bytes"] for item in found if item["kind"] == "all-reduce")
    assert 0 < sent < 2 * 256 * 256 * 4  # two heads


def test_products_of_cublas_count():
    text = """HloModule m, num_partitions=1

ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %out = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %first = bf16[64,16]{1,0} get-tuple-element(%out), index=0
}
"""
    assert hlo.summary(hlo_text.parse(text))["flops"] == 2 * 64 * 32 * 16


# Time ---------------------------------------------------------------------------------------------

CHIP = topologies.Chip(1.0, flops=100.0, hbm=10.0, interconnect=1.0)


def test_roofline_adds_loops_and_overlaps_within_one():
    loops = {
        "": {"flops": 200.0, "traffic_bytes": 10.0, "wire_bytes": 0.0},  # 2 s of compute
        "64": {"flops": 100.0, "traffic_bytes": 50.0, "wire_bytes": 1.0},  # 5 s of HBM
    }
    found = roofline.roofline({"loops": loops}, CHIP)
    assert found == {
        "compute": 3.0,
        "hbm": 6.0,
        "interconnect": 1.0,
        "roofline": 7.0,
        "bound_by": "hbm",
    }


@pytest.mark.parametrize(
    ("method", "share"),
    [
        (gkd.GKDConfig(on_policy_fraction=0.25), 0.25),
        (gkd.GKDConfig(on_policy_fraction=0.25, mixing="example"), 1.0),
        (gkd.GKDConfig(on_policy_fraction=optax.linear_schedule(0.0, 1.0, 99)), 0.5),
    ],
)
def test_the_run_samples_as_often_as_the_coin_says(method, share):
    assert roofline.sampled_share(method, 100) == pytest.approx(share)


def test_chip_hours_of_a_run(monkeypatch, capsys):
    chip = topologies.Chip(1.0, flops=1e9, hbm=1e9, interconnect=1e9, per_chip=2)
    monkeypatch.setattr(precompile, "describe_topology", lambda *_: (chip, jax.devices()))
    found = report(capsys, options(train=TrainConfig(train_steps=900)))
    seconds = {name: phase["seconds"]["roofline"] for name, phase in found["phases"].items()}
    step = 0.5 * seconds["sample"] + seconds["update"]
    assert found["step_seconds"] == pytest.approx(step)
    assert found["chip_hours"] == pytest.approx(900 * step * 4 / 3600)


# The command --------------------------------------------------------------------------------------

TINY = [
    "--gin_file=gin/gkd.gin",
    "--gin.MIXTURE_OR_TASK_NAME='arithmetic'",
    "--gin.STUDENT_SIZE='tiny'",
    "--gin.TEACHER_SIZE='tiny'",
    "--gin.TEACHER_CHECKPOINT='/not/there/yet'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 40, 'targets': 24}",
]


def command(*arguments, study=TINY):
    try:
        main.main(["precompile", *study, *arguments])
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture
def analysed(monkeypatch):
    """Replaces the analysis of every phase by that of a small product, which compiles at once."""
    found = analysis.analyse(jax.jit(lambda x: x @ x), (F32((8, 8), jnp.float32),))
    monkeypatch.setattr(precompile, "analyse", lambda *_, **__: dict(found))


@pytest.mark.usefixtures("analysed")
def test_command_prints_a_table(capfd):
    assert command("--topology=cpu") == 0
    out = capfd.readouterr().out
    assert "fits" in out
    assert {"sample", "score", "update"} <= set(out.splitlines()[1].split())


@pytest.mark.usefixtures("analysed")
def test_command_compiles_one_run_of_a_study(capfd):
    study = "--gin_file=gin/quickstart.gin"
    assert command("--topology=cpu", study=[study]) == 2
    phases = ast.literal_eval(capfd.readouterr().err.split("must be one of ")[1].split(" here")[0])
    assert command("--topology=cpu", "--json", f"--phase={phases[0]}", study=[study]) == 0
    assert list(json.loads(capfd.readouterr().out)["phases"]) == ["update"]


def test_what_does_not_fit_ends_with_status_1_and_its_largest_arrays(monkeypatch, capfd):
    small_chip = topologies.Chip(1e-4), jax.devices()
    monkeypatch.setattr(precompile, "describe_topology", lambda *_: small_chip)
    real = precompile.precompile
    monkeypatch.setattr(
        precompile, "precompile", lambda _, *rest, **more: real(options(), *rest, **more)
    )
    assert command("--topology=cpu", "--json") == 1
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert not found["fits"]
    update = found["phases"]["update"]
    assert update["peak_bytes"] > found["hbm_bytes"] == int(1e-4 * 2**30)
    message = err.splitlines()[-1]
    assert message.startswith("gkd-jax: error: a device has 0.00 GiB; ")
    assert "sample needs" in message
    assert "update needs" in message
    sizes = [size for _, size in update["largest"]]
    assert sizes == sorted(sizes, reverse=True)
    assert update["largest"][0][0] in message


def test_largest_values_of_a_program_that_does_not_compile():
    def function(x):
        def turn(x, _):
            return x, jnp.outer(x, x)

        return jnp.sum(lax.scan(turn, x, None, length=10)[1])

    traced = jax.jit(function).trace(F32((100,), jnp.float32))
    (name, size), (second, half) = analysis.largest_values(traced.jaxpr.jaxpr)[:2]
    assert (name, size) == ("scan float32[10,100,100]", 10 * 100 * 100 * 4)
    assert half == 100 * 100 * 4
    assert "float32[100,100]" in second


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "precompile needs --topology"),
        (("--topology=v9:2x2",), 2, "got 'v9:2x2'"),
        (("--topology=v5e",), 2, "got 'v5e'"),
        (("--topology=v5e:2x2", "--num_slices=0"), 2, "'v5e:2x2' x 0"),
        (("--topology=cpu", "--phase=teacher"), 2, "got 'teacher'"),
        (("--topology=v5e:2x2",), 2, "pip install 'jax[tpu]'"),
        (("--topology=h100:8",), 2, "such as h100:1x1x8"),
        (("--topology=h100:1x1x8", "--num_slices=2"), 2, "'h100:1x1x8' x 2"),
        (("--topology=h100:1x1x8",), 2, "pip install 'jax[cuda"),
    ],
)
def test_wrong_usage(arguments, status, message, monkeypatch, capfd):
    find_spec = importlib.util.find_spec
    absent = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    without = lambda name, *more: None if name in absent else find_spec(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert command(*arguments) == status
    assert message in capfd.readouterr().err.splitlines()[-1]


@needs_libtpu
def test_a_tpu_topology(capfd):
    mesh = ["--gin.sharding.MeshConfig.data=2", "--gin.sharding.MeshConfig.fsdp=4"]
    assert command("--topology=v5e:2x4", "--json", "--gin.DTYPE='bfloat16'", *mesh) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["hbm_bytes"] == int(15.75 * 2**30)
    assert found["device_kind"] == "TPU v5 lite"
    assert found["chip_hours"] > 0
    update = found["phases"]["update"]
    assert update["peak_bytes"] > update["argument_bytes"] > 0
    # The decoder's layers turn inside the loop over tokens.
    assert any(loop.startswith("24 > ") for loop in found["phases"]["sample"]["loops"])


@needs_libtpu
def test_a_teacher_in_host_memory_leaves_its_kernels_out_of_a_tpu(capfd):
    found = []
    for memory in ("device", "host"):
        flag = f"--gin.teacher/pretrained.ModelConfig.memory='{memory}'"
        assert command("--topology=v5e:2x4", "--json", "--gin.DTYPE='bfloat16'", flag) == 0
        found.append(json.loads(capfd.readouterr().out)["phases"])
    assert found[0]["update"]["host_bytes"] == 0
    assert found[1]["update"]["host_bytes"] > 0
    for phase, name in (
        ("update", "argument_bytes"),
        ("update", "peak_bytes"),
        ("sample", "resident_bytes"),
    ):
        assert found[1][phase][name] < found[0][phase][name]


@pytest.mark.skipif(
    not any(importlib.util.find_spec(plugin) for plugin in topologies.CUDA_PLUGINS),
    reason="needs the cuda plugin: pip install 'gkd_jax[gpu]'",
)
def test_a_gpu_topology(capfd):
    assert command("--topology=h100:1x1x8", "--json", "--gin.DTYPE='bfloat16'") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["num_devices"] == 8
    gpu = found["phases"]
    assert command("--topology=cpu", "--json", "--gin.DTYPE='bfloat16'") == 0
    cpu = json.loads(capfd.readouterr().out)["phases"]
    for phase in ("sample", "score", "update"):  # but some of one row, which become sums
        assert gpu[phase]["flops"] == pytest.approx(cpu[phase]["flops"], rel=0.1)


@needs_libtpu
def test_a_program_that_the_compiler_refuses():
    _, devices = topologies.describe_topology("v5e:2x2")
    x = F32((2**16, 2**17), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
    found = analysis.analyse(jax.jit(lambda x: jnp.sin(x).T @ x), (x,), "v5e:2x2")
    assert found["peak_bytes"] > 2**35
    assert found["largest"][0][1] >= 2**35
