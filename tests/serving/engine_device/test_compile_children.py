"""Programs that children compile: CPUs here stand for the GPUs that they are meant for."""

import contextlib
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from lumen_kernels.target import CPU

from lumen.model import model_defs
from lumen.presets import preset
from lumen.sharding import TENSOR_AXIS, HeadLayout
from serving.engine.device import (
    DeviceExecutorConfig,
    build,
    build_device_executor,
    compile_children,
)
from serving.engine.device.arena import ArenaLayout
from serving.engine.device.build import LOADED
from serving.engine.device.compilation import compile_all
from serving.engine.device.compile_children import CompileChildren, children_for
from serving.engine.device.compile_recipe import RecipeError, recipe
from serving.engine.device.compiler_options import compiler_options
from serving.engine.device.executables import loaded_executable
from serving.engine.device.head_programs import HeadKind
from serving.engine.device.memory import DeviceMemory
from serving.engine.device.program_shapes import ProgramShapes
from serving.engine.device.program_source import Source
from serving.engine.device.programs import ProgramBuilder

KEY = ("decode_embed", 1)
CONFIG = DeviceExecutorConfig(
    max_model_len=64, num_rows=1, num_blocks=32, max_prefill_tokens=16, prefill_buckets=(16,)
)


@pytest.fixture(scope="module")
def what():
    """The recipe of a replica on device 1."""
    config = preset("tiny-smollm")
    mesh = Mesh(np.array(jax.devices()[1:2]), (TENSOR_AXIS,))
    heads = HeadLayout(config.num_heads, config.num_kv_heads, 1)
    layout = ArenaLayout(32, 6, 2, 16, (2, 16, 8), jnp.dtype(jnp.float32))
    defs = model_defs(config, heads, jnp.dtype(jnp.float32))
    shapes = ProgramShapes(config, defs, mesh, jnp.dtype(jnp.float32), layout, 1, 4, 5)
    return recipe(shapes, CPU, (1,), {16: 1})


@pytest.fixture
def made(request, what):
    """Makes children that end with the test."""

    def make(count: int = 1, recipe=what, **options) -> CompileChildren:
        children = CompileChildren(count, recipe, **options)
        request.addfinalizer(children.close)
        return children

    return make


def kill(children: CompileChildren) -> None:
    """All of them, as someone else would."""
    os.killpg(children._family.pid, signal.SIGKILL)


def start(weights, folder, monkeypatch, *, count=2, devices=None):
    """(executor, programs told of, programs lowered in this process)."""
    lowered: list[str] = []
    lower = ProgramBuilder._lower

    def noted(self, function, *arguments, **options):
        lowered.append(function.__name__)
        return lower(self, function, *arguments, **options)

    monkeypatch.setattr(ProgramBuilder, "_lower", noted)
    monkeypatch.setattr(compile_children, "children_for", lambda *what: count)
    told: list[str] = []
    executor = build_device_executor(
        weights("tiny-smollm"), devices or jax.devices()[1:2],
        dataclasses.replace(CONFIG, cache_dir=folder), lambda done, total, what: told.append(what),
    )  # fmt: skip
    return executor, [name for name in told if name != "weights"], lowered


def test_children_compile_what_this_process_would(weights, tmp_path, monkeypatch, drive, prompt):
    executor, names, lowered = start(weights, tmp_path, monkeypatch)
    assert len(names) == 1 + 7 + 3
    assert not lowered
    assert not [name for name in names if name.endswith(LOADED)]
    arena = sum(segment.nbytes for segment in executor._passes.arena)
    assert executor._passes.programs.decode_unit[1].memory_analysis().alias_size_in_bytes >= arena
    here = build_device_executor(weights("tiny-smollm"), jax.devices()[1:2], CONFIG)
    tokens = drive(executor).generate(0, prompt(20), 8)
    assert tokens == drive(here).generate(0, prompt(20), 8)
    assert executor.compilations_since_start() == 0

    def no_more(*what):
        raise AssertionError("children were started, and all there is to do is to load")

    monkeypatch.setattr(compile_children.subprocess, "Popen", no_more)
    monkeypatch.setattr(compile_children, "children_for", lambda devices, programs: programs)
    again = build_device_executor(
        weights("tiny-smollm"), jax.devices()[1:2], dataclasses.replace(CONFIG, cache_dir=tmp_path)
    )
    assert drive(again).generate(0, prompt(20), 8) == tokens


def test_what_children_cannot_do_is_done_here(weights, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compile_children, "_MODULE", "serving.engine.device.no_such_module")
    _, names, lowered = start(weights, tmp_path, monkeypatch)
    assert len(names) == len(lowered) + 1 == 11  # zero_arena is lowered in a way of its own
    assert caplog.text.count("A process that compiles is gone") == 2


def test_a_system_without_room_for_children_compiles_here(weights, tmp_path, monkeypatch, caplog):
    def none(*arguments, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(compile_children.subprocess, "Popen", none)
    _, names, lowered = start(weights, tmp_path, monkeypatch)
    assert len(names) == len(lowered) + 1 == 11
    assert "All programs are compiled in one process: [Errno 11]" in caplog.text


def test_a_wrong_guess_of_the_arena_is_made_good(weights, tmp_path, monkeypatch):
    """Memory that something else takes while weights load: the arena is another than foreseen."""
    sizes = iter([1 << 30, (1 << 30) - (1 << 20)])
    monkeypatch.setattr(
        build, "device_memory", lambda devices: DeviceMemory("chip", 1 << 30, next(sizes), False)
    )
    monkeypatch.setattr(compile_children, "children_for", lambda *what: 1)
    config = dataclasses.replace(CONFIG, num_blocks=None, memory_fraction=0.01, cache_dir=tmp_path)
    executor = build_device_executor(weights("tiny-smollm"), jax.devices()[1:2], config)
    limits = executor.limits
    (arena,) = executor._passes.arena
    block = limits.slots_per_block * arena[0].nbytes
    assert limits.num_blocks == (int((1 << 30) * 0.01) - (1 << 20)) // block
    assert arena.shape[0] == limits.num_blocks * limits.slots_per_block


def test_the_arena_is_foreseen_from_the_weights(executor):
    config = preset("tiny-smollm")
    heads = HeadLayout(config.num_heads, config.num_kv_heads, 1)
    foreseen = build._weight_bytes(config, model_defs(config, heads, jnp.dtype(jnp.float32)))
    model = executor._passes.model
    arrays = {id(array): array for array in jax.tree.leaves((model.embedding, model.units))}
    arrays |= {id(array): array for array in model.head}
    rounded = sum(-(-array.nbytes // 256) * 256 for array in arrays.values())
    assert foreseen == rounded


def test_a_child_that_dies_is_not_waited_for(made, caplog):
    children = made(2)
    first = children.compile(KEY)
    assert first is not None
    loaded_executable(first, (jax.devices()[1],))
    kill(children)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(children.compile, [KEY] * 4)) == [None] * 4
    assert caplog.text.count("A process that compiles is gone") == 2


def test_a_child_that_dies_at_work_is_not_waited_for(made):
    children = made()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(children.compile, ("draw", 1, HeadKind.COMPLETE))
        time.sleep(0.1)
        kill(children)
        assert coming.result(30) is None


def test_a_child_that_takes_too_long_is_given_up(made, caplog):
    children = made(answer_s=0.01)
    assert children.compile(KEY) is None
    assert "no answer in 0 s" in caplog.text
    children.close()
    assert children._family.returncode == -signal.SIGKILL


def test_a_program_that_fails_costs_no_child(made, caplog):
    children = made()
    assert children.compile(("no such kind", 1)) is None
    assert "could not compile ('no such kind', 1): KeyError" in caplog.text
    assert children.compile(KEY) is not None


def test_closing_ends_whoever_waits(made, caplog):
    children = made()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(children.compile, KEY) for _ in range(2)]
        children.close()
        assert [one.result(30) for one in waiting] == [None, None]
    assert not caplog.records


def test_a_child_of_other_code_compiles_nothing(made, what):
    other = dataclasses.replace(what, identity="other code")
    with pytest.raises(RecipeError, match="are others"):
        other.shapes()
    assert made(recipe=other).compile(KEY) is None


def test_a_recipe_for_devices_that_are_not_there_is_refused(what):
    with pytest.raises(RecipeError, match=r"no devices \[100\] here"):
        dataclasses.replace(what, device_ids=(100,)).shapes()


_PARENT = """
import pickle, sys, time
from serving.engine.device.compilation import compile_all
from serving.engine.device.compile_children import CompileChildren
children = CompileChildren(2, pickle.load(sys.stdin.buffer))
print(children._family.pid, flush=True)
children.compile(("decode_embed", 1))
print("compiled", flush=True)
time.sleep(60)
"""


def test_a_child_ends_with_its_parent(what):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment,
    ) as parent:  # fmt: skip
        parent.stdin.write(pickle.dumps(what))
        parent.stdin.flush()
        group = int(parent.stdout.readline())
        assert parent.stdout.readline() == b"compiled\n"
        assert len(running(group)) == 2
        parent.kill()
    deadline = time.monotonic() + 60
    while running(group):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(group: int) -> list[int]:
    """Processes of the group that do not merely wait to be reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


@pytest.fixture
def likely(monkeypatch):
    """There seem to be a GPU and four cores."""
    monkeypatch.setattr(compile_children, "_gpu_is_likely", lambda: True)
    monkeypatch.setattr(compile_children, "_cores", lambda: 4)
    yield
    compile_children.dismiss()


def test_children_that_were_prepared_are_taken_over(likely, made):
    compile_children.prepare()
    (family,) = compile_children._prepared
    compile_children.prepare()
    assert compile_children._prepared == [family]
    children = made(2)
    assert children.count == 2
    assert not compile_children._prepared
    assert children.compile(KEY) is not None
    deadline = time.monotonic() + 60
    while len(running(family.pid)) > 2:  # the others have found out
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(running(family.pid)) == 2
    children.close()
    assert family.returncode == -signal.SIGKILL


def test_children_that_are_not_needed_are_dismissed(likely, monkeypatch):
    monkeypatch.setattr(compile_children, "_MODULE", "this")
    compile_children.prepare()
    (family,) = compile_children._prepared
    compile_children.dismiss()
    assert family.returncode is not None
    assert not compile_children._prepared


@pytest.mark.parametrize(("cores", "gpu"), [(3, True), (4, False)])
def test_children_are_not_prepared_where_they_do_not_pay(likely, monkeypatch, cores, gpu):
    monkeypatch.setattr(compile_children, "_gpu_is_likely", lambda: gpu)
    monkeypatch.setattr(compile_children, "_cores", lambda: cores)
    compile_children.prepare()
    assert not compile_children._prepared


def test_a_gpu_is_likely_where_its_driver_is(tmp_path, monkeypatch):
    driver = tmp_path / "driver"
    monkeypatch.setattr(compile_children, "_DRIVER", driver)
    before = jax.config.jax_platforms
    try:
        for platforms, expected in ((None, True), ("cuda,cpu", True), ("cpu", False)):
            jax.config.update("jax_platforms", platforms)
            assert not compile_children._gpu_is_likely()
            driver.touch()
            assert compile_children._gpu_is_likely() == expected
            driver.unlink()
    finally:
        jax.config.update("jax_platforms", before)


def test_what_xla_is_told_reaches_it():
    lower = jax.jit(lambda x: x + 1).lower
    source = Source((), lambda: lower(jnp.arange(4)), ())
    assert compile_all({"one": source}, 1, lambda *what: None, options=compiler_options("gpu"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compile_all({"one": source}, 1, lambda *what: None, options={"no_such_option": 1})
    assert compiler_options("cpu") == compiler_options("tpu") == {}


@dataclasses.dataclass
class Chip:
    platform: str


@pytest.mark.parametrize(
    ("platforms", "cores", "programs", "count"),
    [
        (["gpu"], 16, 100, 16),
        (["gpu"], 64, 100, 32),
        (["gpu"], 8, 100, 8),
        (["gpu"], 16, 5, 5),
        (["gpu"], 16, 3, 0),
        (["gpu"], 2, 100, 0),
        (["gpu", "gpu"], 16, 100, 0),
        (["cpu"], 16, 100, 0),
        (["tpu"], 16, 100, 0),
    ],
)
def test_children_are_started_where_they_pay(monkeypatch, platforms, cores, programs, count):
    monkeypatch.setattr(compile_children, "_cores", lambda: cores)
    assert children_for([Chip(platform) for platform in platforms], programs) == count


def test_children_see_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    environment = compile_children._environment()
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["JAX_PLATFORMS"]) == ("", "cpu")
