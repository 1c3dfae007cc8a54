"""A second start loads every program and traces none, whatever happened to the folder."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import hashlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lumen_kernels.target import CPU

from lumen.model import model_defs
from lumen.presets import preset
from lumen.sharding import TENSOR_AXIS, HeadLayout
from serving.engine.device import (
    DeviceExecutorConfig,
    build_device_executor,
    executables,
    program_cache,
)
from serving.engine.device.arena import ArenaLayout
from serving.engine.device.build import LOADED
from serving.engine.device.compilation import compile_all, without_jax_cache
from serving.engine.device.program_cache import (
    ProgramCache,
    check_trusted,
    loads_what_it_saved,
    may_load,
    may_move,
    open_program_cache,
)
from serving.engine.device.program_identity import (
    SOURCES,
    digest,
    replica_identity,
    source_digest,
)
from serving.engine.device.program_shapes import ProgramShapes
from serving.engine.device.program_signature import UNTOLD, mismatch
from serving.engine.device.program_source import Source
from serving.engine.device.programs import ProgramBuilder
from serving.engine.device.step_attention import StepAttention
from serving.errors import ConfigurationError

PROGRAMS = 1 + 7 + 3  # one bucket of decode, one of prefill


def start(weights, folder: Path, devices=None):
    """(executor, names of programs made, in order)."""
    config = DeviceExecutorConfig(
        max_model_len=64, num_rows=1, num_blocks=32, max_prefill_tokens=16, prefill_buckets=(16,),
        cache_dir=folder,
    )  # fmt: skip
    told: list[str] = []
    executor = build_device_executor(
        weights("tiny-smollm"), devices or jax.devices()[1:2], config,
        lambda done, total, what: told.append(what),
    )  # fmt: skip
    return executor, [what for what in told if what != "weights"]


def loaded(names: list[str]) -> int:
    return sum(name.endswith(LOADED) for name in names)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.suffix)


@pytest.fixture(scope="module")
def filled(weights, tmp_path_factory):
    """A folder with the programs of one replica on device 1, and what it generates."""
    folder = tmp_path_factory.mktemp("cache")
    executor, names = start(weights, folder)
    assert (len(names), loaded(names)) == (PROGRAMS, 0)
    return folder, executor


@pytest.fixture
def copy(filled, tmp_path):
    """The filled folder, to be damaged."""
    target = tmp_path / "cache"
    subprocess.run(["cp", "-a", str(filled[0]), str(target)], check=True)
    return target


@pytest.fixture
def no_tracing(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a program was traced")

    monkeypatch.setattr(ProgramBuilder, "_lower", refuse)
    monkeypatch.setattr(ProgramBuilder, "_zero_arena", refuse)
    monkeypatch.setattr(StepAttention, "decode_schedule", refuse)
    monkeypatch.setattr(StepAttention, "prefill_schedule", refuse)


def test_a_second_start_traces_nothing_and_generates_the_same(
    weights, filled, drive, prompt, no_tracing
):
    folder, first = filled
    second, names = start(weights, folder)
    assert loaded(names) == len(names) == PROGRAMS
    expected = drive(first).generate(0, prompt(20), 8)
    assert drive(second).generate(0, prompt(20), 8) == expected
    assert second.compilations_since_start() == 0


def test_loaded_programs_update_the_arena_in_place(weights, filled):
    executor, _ = start(weights, filled[0])
    limits = executor.limits
    arena = limits.num_blocks * limits.slots_per_block * 2 * limits.block_size * 8 * 4
    for unit in executor._passes.programs.decode_unit.values():
        assert unit.memory_analysis().alias_size_in_bytes >= arena


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-100], "damaged"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "damaged"),
        (lambda content: b"", "another format"),
        (lambda content: content.replace(b"lumen program 1", b"lumen program 0", 1), "format"),
        (lambda content: content.replace(b"decode_unit 1", b"decode_unit 2", 1), "another program"),
    ],
)
def test_an_entry_that_cannot_be_used_is_compiled_anew(weights, copy, caplog, damage, reason):
    (entry,) = copy.rglob("decode_unit-1")
    entry.write_bytes(damage(entry.read_bytes()))
    _, names = start(weights, copy)
    assert [name for name in names if not name.endswith(LOADED)] == ["decode_unit 1"]
    assert reason in caplog.text
    _, names = start(weights, copy)
    assert loaded(names) == PROGRAMS


def test_an_entry_that_breaks_while_loading_is_compiled_anew(weights, copy, caplog):
    (entry,) = copy.rglob("head-1")
    head = b"\n".join(entry.read_bytes().split(b"\n", 3)[:2])
    body = pickle.dumps((b"no executable", None, None, [1]))
    sha = hashlib.sha256(body).hexdigest().encode()
    entry.write_bytes(b"\n".join((head, sha, body)))
    _, names = start(weights, copy)
    assert loaded(names) == PROGRAMS - 1
    assert "head-1 is of no use" in caplog.text


def test_a_program_that_takes_something_else_is_compiled_anew(weights, copy, caplog):
    sampled, complete = (next(copy.rglob(f"draw-1-{kind}")) for kind in ("sampled", "complete"))
    complete.write_bytes(sampled.read_bytes().replace(b"draw 1 sampled", b"draw 1 complete", 1))
    _, names = start(weights, copy)
    assert loaded(names) == PROGRAMS - 1
    assert "draw-1-complete is of no use (it takes 3 arguments, not 4)" in caplog.text


def test_replicas_of_one_process_share_their_programs(weights, filled, drive, prompt, no_tracing):
    folder, first = filled
    other, names = start(weights, folder, jax.devices()[2:3])
    assert loaded(names) == len(names) == PROGRAMS
    expected = drive(first).generate(0, prompt(20), 8)
    assert drive(other).generate(0, prompt(20), 8) == expected
    (arena,) = other._passes.arena
    assert arena.devices() == {jax.devices()[2]}
    assert other.compilations_since_start() == 0


def test_where_programs_cannot_be_moved_each_replica_has_its_own(
    weights, copy, drive, prompt, monkeypatch, caplog
):
    def broken(*what):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: not to another device")

    monkeypatch.setattr(executables, "_moved", broken)
    with caplog.at_level(logging.INFO):
        first, names = start(weights, copy, jax.devices()[:1])
    assert loaded(names) == 0
    assert "UNIMPLEMENTED: not to another device" in caplog.text
    again, names = start(weights, copy, jax.devices()[:1])
    assert loaded(names) == PROGRAMS
    expected = drive(first).generate(0, prompt(20), 8)
    assert drive(again).generate(0, prompt(20), 8) == expected


def test_programs_of_several_devices_stay_there(tmp_path):
    with without_jax_cache():
        assert may_move(mesh_of(3))
        assert not may_move(mesh_of(2, 3))


def test_a_device_that_computes_nonsense_from_anothers_program_has_its_own(monkeypatch):
    loaded = program_cache.loaded_executable
    monkeypatch.setattr(
        program_cache, "loaded_executable", lambda *what: lambda x: loaded(*what)(x) + 1.0
    )
    with without_jax_cache():
        assert not may_move(mesh_of(1))


def test_two_devices_load_what_two_devices_saved(weights, copy, drive, prompt):
    first, _ = start(weights, copy, jax.devices()[2:4])
    second, names = start(weights, copy, jax.devices()[2:4])
    assert loaded(names) == PROGRAMS
    expected = drive(first).generate(0, prompt(20), 8)
    assert drive(second).generate(0, prompt(20), 8) == expected


_CHILD = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
from lumen.presets import preset
from lumen.random_weights import RandomWeights
from serving.engine.device import DeviceExecutorConfig, build_device_executor
build_device_executor(
    RandomWeights(preset("tiny-smollm"), "tiny-smollm"), jax.devices()[1:2],
    DeviceExecutorConfig(
        max_model_len=64, num_rows=1, num_blocks=32, max_prefill_tokens=16, prefill_buckets=(16,),
        cache_dir=Path(sys.argv[1]),
    ),
)
"""


def test_processes_may_start_at_once_and_others_load_what_they_kept(weights, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(tmp_path)],
            stderr=subprocess.PIPE, text=True, env=environment,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in children:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert not list(tmp_path.rglob(".writing-*"))
    _, names = start(weights, tmp_path)
    assert loaded(names) == PROGRAMS


def mesh_of(*numbers: int) -> Mesh:
    return Mesh(np.array([jax.devices()[number] for number in numbers]), (TENSOR_AXIS,))


def shapes_of(mesh: Mesh, **changes) -> ProgramShapes:
    config = preset("tiny-smollm")
    heads = HeadLayout(config.num_heads, config.num_kv_heads, mesh.size)
    layout = ArenaLayout(32, 12, 2, 16, (2, 16, 8), jnp.float32)
    shapes = ProgramShapes(
        config, model_defs(config, heads, jnp.float32), mesh, jnp.float32, layout, 2, 4, 5
    )
    return dataclasses.replace(shapes, **changes)


def test_the_identity_says_all_that_programs_depend_on(monkeypatch):
    mesh = mesh_of(1)
    shapes = shapes_of(mesh)
    base = digest(replica_identity(shapes, CPU))
    assert digest(replica_identity(shapes_of(mesh), CPU)) == base
    others = [
        shapes_of(mesh_of(2)),
        shapes_of(mesh_of(1, 2)),
        shapes_of(mesh, num_rows=3),
        shapes_of(mesh, table_columns=5),
        shapes_of(mesh, max_logprobs=6),
        shapes_of(mesh, dtype=jnp.bfloat16),
        shapes_of(mesh, config=dataclasses.replace(preset("tiny-smollm"), rope_theta=5.0)),
        shapes_of(mesh, arena_layout=dataclasses.replace(shapes.arena_layout, num_blocks=33)),
        shapes_of(mesh, arena_layout=dataclasses.replace(shapes.arena_layout, dtype=jnp.bfloat16)),
    ]
    found = {digest(replica_identity(other, CPU)) for other in others} | {base}
    assert len(found) == len(others) + 1
    anywhere = digest(replica_identity(shapes, CPU, anywhere=True))
    assert anywhere == digest(replica_identity(shapes_of(mesh_of(2)), CPU, anywhere=True))
    assert anywhere not in found
    target = dataclasses.replace(CPU, cores=2)
    assert digest(replica_identity(shapes, target)) not in found
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_fast_math")
    assert digest(replica_identity(shapes, CPU)) not in found


@pytest.mark.parametrize(
    ("setting", "value"),
    [("jax_default_matmul_precision", "highest"), ("jax_threefry_partitionable", False)],
)
def test_a_setting_of_jax_is_another_identity(setting, value):
    shapes = shapes_of(mesh_of(1))
    base = digest(replica_identity(shapes, CPU))
    before = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        assert digest(replica_identity(shapes, CPU)) != base
    finally:
        jax.config.update(setting, before)
    assert digest(replica_identity(shapes, CPU)) == base


def test_another_version_of_anything_installed_is_another_identity(monkeypatch):
    shapes = shapes_of(mesh_of(1))
    base = replica_identity(shapes, CPU)
    assert f"jaxlib=={jaxlib.__version__}" in base["packages"]

    class Newer:
        name, version = "jaxlib", "99.0"

    monkeypatch.setattr("importlib.metadata.distributions", lambda: [Newer])
    assert digest(replica_identity(shapes, CPU)) != digest(base)


def test_an_edited_source_is_another_identity(tmp_path, monkeypatch):
    folder = tmp_path / "package"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "one.py").write_text("a = 1\n")
    base = source_digest([folder])
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "one.pyc").write_bytes(b"byte code")
    assert source_digest([folder]) == base
    (folder / "sub" / "one.py").write_text("a = 2\n")
    edited = source_digest([folder])
    (folder / "sub" / "one.py").rename(folder / "sub" / "two.py")
    assert len({base, edited, source_digest([folder])}) == 3

    shapes = shapes_of(mesh_of(1))
    before = digest(replica_identity(shapes, CPU))
    monkeypatch.setattr("serving.engine.device.program_identity._IMPORTED", edited)
    assert digest(replica_identity(shapes, CPU)) != before


def test_the_sources_are_those_that_programs_are_made_of():
    assert {folder.name for folder in SOURCES} == {"lumen", "lumen_kernels", "device"}
    assert all((folder / "__init__.py").is_file() for folder in SOURCES)


def test_a_field_that_cannot_be_written_down_is_refused():
    with pytest.raises(TypeError):
        replica_identity(shapes_of(mesh_of(1), num_rows=object()), CPU)


def doubling(mesh: Mesh, size: int):
    struct = jax.ShapeDtypeStruct(
        (size,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    return Source(("double", size), lambda: jax.jit(lambda x: 2 * x).lower(struct), (struct,))


def test_what_another_mesh_placed_is_a_mismatch(tmp_path):
    mesh = mesh_of(0, 1)
    compiled = doubling(mesh, 4).lower().compile()
    cut = jax.ShapeDtypeStruct(
        (4,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(TENSOR_AXIS))
    )
    assert mismatch(compiled, doubling(mesh, 4).arguments) is None
    assert "lies otherwise" in mismatch(compiled, (cut,))
    assert mismatch(compiled, doubling(mesh, 5).arguments) == (
        "argument 0 is float32[4], not float32[5]"
    )
    assert "takes 1 arguments, not 2" in mismatch(compiled, (cut, cut))
    assert "another structure" in mismatch(compiled, ((cut,),))


def test_threads_may_share_a_cache(tmp_path):
    mesh = mesh_of(1)
    with without_jax_cache():
        cache = open_program_cache(tmp_path / "cache", mesh, {"test": 1})
        gate = threading.Barrier(4)

        def all_at_once():
            gate.wait()
            told: list[tuple[str, bool]] = []
            sources = {f"double {size}": doubling(mesh, size) for size in (1, 2, 3)}
            made = compile_all(sources, 2, lambda *what: told.append(what), cache)
            x = jax.device_put(np.ones(3, np.float32), mesh.devices.flat[0])
            return float(made["double 3"](x)[0]), len(told)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = [pool.submit(all_at_once) for _ in range(4)]
            assert [result.result() for result in results] == [(2.0, 3)] * 4
    assert cache.load("double 3", doubling(mesh, 3).arguments) is not None


@pytest.fixture
def compiled_here():
    with without_jax_cache():
        yield


@pytest.mark.usefixtures("compiled_here")
def test_identities_not_used_for_longest_make_room(tmp_path):
    root, mesh = tmp_path / "cache", mesh_of(0)
    caches = [open_program_cache(root, mesh, {"test": number}) for number in range(3)]
    for age, cache in enumerate(caches):
        (cache.folder / "program").write_bytes(bytes(1000))
        os.utime(cache.folder, (1e9 - age, 1e9 - age))
    open_program_cache(root, mesh, {"test": 2}, max_bytes=2500)
    assert [cache.folder.exists() for cache in caches] == [True, False, True]


@pytest.mark.usefixtures("compiled_here")
def test_a_cleared_folder_is_made_again(tmp_path):
    mesh = mesh_of(0)
    cache = open_program_cache(tmp_path / "cache", mesh, {"test": 1})
    (cache.folder / "identity.json").unlink()
    cache.folder.rmdir()
    cache.store("double 2", doubling(mesh, 2).lower().compile())
    assert cache.load("double 2", doubling(mesh, 2).arguments) is not None


def test_what_cannot_be_kept_is_said_and_no_more(tmp_path, caplog):
    cache = ProgramCache(tmp_path / "file" / "cache", (jax.devices()[0],))
    (tmp_path / "file").write_text("in the way")
    cache.store("double 2", doubling(mesh_of(0), 2).lower().compile())
    assert "double-2 was not kept" in caplog.text


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_to_is_refused(weights, tmp_path, mode):
    folder = tmp_path / "executables"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigurationError, match=rf"others may write to it \(mode {mode:o}\).*"):
        start(weights, tmp_path)
    folder.chmod(0o700)
    assert check_trusted(folder) is None


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigurationError, match="belongs to user"):
        check_trusted(tmp_path)


def test_folders_are_made_for_their_owner_alone(filled):
    root = filled[0] / "executables"
    assert {path.stat().st_mode & 0o77 for path in (root, *root.rglob("*"))} == {0}


def test_devices_that_compute_nonsense_from_a_file_get_no_cache(monkeypatch, caplog):
    loaded = program_cache.loaded_executable
    monkeypatch.setattr(
        program_cache, "loaded_executable", lambda *what: lambda x: loaded(*what)(x) + 1.0
    )
    assert not loads_what_it_saved(mesh_of(0, 1))
    assert "nonsense" in caplog.text


def test_devices_that_cannot_load_run_without_a_cache(weights, tmp_path, monkeypatch, caplog):
    def broken(*arguments, **options):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: not on this device")

    monkeypatch.setattr(executables.serialize_executable, "deserialize_and_load", broken)
    with caplog.at_level(logging.WARNING):
        executor, names = start(weights, tmp_path)
    assert (len(names), loaded(names)) == (PROGRAMS, 0)
    assert "UNIMPLEMENTED" in caplog.text
    assert not entries(tmp_path)
    assert executor.compilations_since_start() == 0


def test_tpus_load_only_with_device_zero():
    @dataclasses.dataclass
    class Chip:
        id: int
        platform: str = "tpu"

    assert may_load([Chip(0), Chip(1)])
    assert not may_load([Chip(1)])
    assert may_load([Chip(1, "gpu")])


def test_collections_pause_while_programs_are_made(tmp_path):
    seen: list[bool] = []

    def lower():
        seen.append(gc.isenabled())
        raise ValueError("no such program")

    with pytest.raises(ValueError, match="no such program"):
        compile_all({"broken": Source((), lower, ())}, 1, lambda *what: None)
    assert (seen, gc.isenabled()) == ([False], True)


def test_jax_caches_nothing_meanwhile():
    with without_jax_cache(), contextlib.ExitStack() as nested:
        nested.enter_context(without_jax_cache())
        assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache


def test_parts_of_arguments_that_only_tracing_tells_are_not_looked_at(tmp_path):
    struct = doubling(mesh_of(0), 4).arguments[0]

    def first(pair):
        return pair[0]

    compiled = jax.jit(first).lower((struct, (struct, struct))).compile()
    assert mismatch(compiled, ((struct, (struct, struct)),)) is None
    assert mismatch(compiled, ((struct, UNTOLD),)) is None
    assert mismatch(compiled, (UNTOLD,)) is None
    assert "another structure" in mismatch(compiled, ((UNTOLD, struct),))
    assert "another structure" in mismatch(compiled, ((struct, UNTOLD, UNTOLD),))
