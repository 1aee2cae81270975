"""Programs that are kept on disk: loaded by the next process, and never where anything is odd."""

import json
import os

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from gati_jax.files import lock_file
from serve.engine import program_cache, routes
from serve.engine.program_cache import LOCK, RECORD, UNPROVED, ProgramCache
from serve.engine.records import Job, Step
from serve.engine.runner import JaxRunner
from tests.serve.fake_runner import pixels

X = np.arange(6, dtype=np.float32).reshape(2, 3)
HIT = "/jax/compilation_cache/cache_hits"


class Programs:
    """Compiles one program, as a process does that has compiled nothing yet."""

    def __init__(self, folder, factor=2.0, **options):
        self.cache, self.factor, self.compiled = ProgramCache(folder, **options), factor, 0

    def build(self, key="one"):
        hits = []
        jax.monitoring.register_event_listener(listener := lambda event, **_: hits.append(event))

        def make():
            self.compiled += 1
            return jax.jit(lambda x: jnp.sin(x) * jnp.float32(self.factor)).lower(X).compile()

        try:
            program = self.cache.build(key, make, lambda program: {"sin": np.asarray(program(X))})
        finally:
            jax.monitoring.unregister_event_listener(listener)
        np.testing.assert_allclose(program(X), np.sin(X) * self.factor, rtol=1e-6)
        return hits.count(HIT)


def warnings_of(caplog):
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return found


def place_of(folder):
    (record,) = folder.glob(f"*/*/{RECORD}")
    return record.parent


def test_the_next_process_loads_what_was_compiled(tmp_path, caplog):
    folder = tmp_path / "made" / "here"
    assert [Programs(folder).build() for _ in range(3)] == [0, 1, 1]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert warnings_of(caplog) == []


def truncate(place):
    next(place.glob("*-cache")).write_bytes(b"x")


def add(place):
    (place / "other-cache").write_bytes(b"x")


def garble(place):
    (place / RECORD).write_bytes(b"{")


def crash(place):
    (place / UNPROVED).touch()


def misremember(place):
    record = json.loads((place / RECORD).read_bytes())
    record["outputs"]["sin"][1][1] += 0.01
    (place / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize("spoil", [truncate, add, garble, crash, misremember])
def test_whatever_is_odd_is_one_warning_and_everything_is_compiled_anew(tmp_path, caplog, spoil):
    Programs(tmp_path).build()
    spoil(place_of(tmp_path))
    assert Programs(tmp_path).build() == (spoil is misremember)  # that is seen when it has run
    (warning,) = warnings_of(caplog)
    assert "compiled anew" in warning
    Programs(tmp_path).build()
    assert Programs(tmp_path).build() == 1
    assert warnings_of(caplog) == []


def test_a_program_that_ends_the_process_is_not_loaded_twice(tmp_path, caplog):
    Programs(tmp_path).build()

    def die(_):
        raise KeyboardInterrupt  # in place of SIGILL, after which nothing runs

    with pytest.raises(KeyboardInterrupt):
        ProgramCache(tmp_path).build("one", lambda: 1, die)
    assert Programs(tmp_path).build() == 0
    assert "did not come to an end" in warnings_of(caplog)[0]


def others_may_write(folder):
    folder.chmod(0o770)


def link(folder):
    folder.rename(folder.with_name("else"))
    folder.symlink_to(folder.with_name("else"))


def file(folder):
    folder.rename(folder.with_name("else"))
    folder.write_text("")


@pytest.mark.parametrize("spoil", [others_may_write, link, file])
def test_a_folder_of_which_others_may_dispose_is_not_used(tmp_path, caplog, spoil):
    folder = tmp_path / "programs"
    Programs(folder).build()
    spoil(folder)
    programs = Programs(folder)
    assert [programs.build(), programs.build("two")] == [0, 0]
    assert len(warnings_of(caplog)) == 1


def test_while_another_process_compiles_nothing_is_kept(tmp_path, caplog):
    Programs(tmp_path).build()
    with lock_file(tmp_path / LOCK):
        assert Programs(tmp_path).build() == 0
    assert "no other process" in warnings_of(caplog)[0]


def test_a_failure_of_the_compiler_is_the_callers(tmp_path, caplog):
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        ProgramCache(tmp_path).build("one", fail, lambda _: {})
    assert len(warnings_of(caplog)) == 1


def test_another_processor_or_compiler_has_another_folder(tmp_path, monkeypatch):
    Programs(tmp_path).build()
    monkeypatch.setattr(program_cache, "_processor", lambda: ["flags : fpu avx512f"])
    assert Programs(tmp_path).build() == 0
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert Programs(tmp_path).build() == 0
    assert len([*tmp_path.glob(f"*/*/{RECORD}")]) == 3


def test_what_was_not_used_for_the_longest_time_goes_first(tmp_path):
    for n, key in enumerate("ab"):
        Programs(tmp_path, factor=3.0 + n).build(key)
    for n, record in enumerate(sorted(tmp_path.glob(f"*/*/{RECORD}"), key=lambda path: path.stat().st_mtime)):
        os.utime(record, (n, n))
    Programs(tmp_path, factor=3.0).build("a")  # used again
    size = sum(file.stat().st_size for file in place_size(tmp_path))
    Programs(tmp_path, factor=5.0, most_bytes=int(size * 1.2)).build("c")
    assert [Programs(tmp_path, factor=3.0 + n).build(key) for key, n in (("a", 0), ("c", 2), ("b", 1))] == [1, 1, 0]


def place_size(folder):
    return [file for file in folder.glob("*/*/*") if file.is_file()]


def test_the_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert program_cache.default_folder() == tmp_path / "gati-jax" / "programs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert program_cache.default_folder().parts[-3:] == (".cache", "gati-jax", "programs")


def test_a_runner_answers_by_kept_programs_and_begins_with_the_smallest_batch(tmp_path, residual):
    """The second runner compiles nothing, and both grow to the batches of one that compiled all at once."""
    sources, found = routes.load(residual), []
    for _ in range(2):
        jax.clear_caches()  # as in a new process: what is in memory is not written
        runner = JaxRunner(sources, capacity=4, buckets=(1, 4), first=True, kept=ProgramCache(tmp_path))
        assert [set(route.stage_ms) for route in runner.routes] == [{1}, {1}]
        compiled = runner.compile_next()
        assert compiled is not None
        assert [set(route.stage_ms) for route in runner.take_next(compiled)] == [{1, 4}, {1, 4}]
        assert runner.compile_next() is None
        jobs = tuple(Job(image=x, route=0, arrived=0.0, slot=slot) for slot, x in enumerate(pixels(4)))
        found.append(runner.dispatch(Step(0, 0, 4, jobs)).result())
    files = [*place_of(tmp_path).glob("jit__run-*")]
    assert len(files) == 2 * 4  # of two batches: three stages of the plan, and the base
    np.testing.assert_array_equal(found[0].logits, found[1].logits)
