"""The decorator notes, checks and changes nothing else."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from taskkit.tasks import TaskOptions, is_async, is_generator, make_options, noted_functions, options_of, task


def _never(exception: BaseException, task_result: Any) -> None:
    return None


@task
def bare(n: int) -> int:
    """Return the next number."""
    return n + 1


@task(pool="heavy", priority=7, timeout=3, max_attempts=2, backoff=_never, memory_limit=10, loop="trio")
async def full() -> None:
    """Do nothing."""


def test_the_function_stays_what_it_was() -> None:
    assert bare(1) == 2
    assert type(bare) is type(_never)
    assert pickle.loads(pickle.dumps(bare)) is bare
    assert bare.__doc__ == "Return the next number."


def test_options_are_kept_on_the_function() -> None:
    assert options_of(bare) == TaskOptions()
    options = options_of(full)
    assert options is not None
    assert (options.pool, options.priority, options.timeout, options.max_attempts) == ("heavy", 7, 3.0, 2)
    assert (options.backoff, options.memory_limit, options.loop) == (_never, 10, "trio")
    assert {bare, full} <= set(noted_functions())


def test_what_is_no_task_has_no_options() -> None:
    class Lookalike:
        bulkhead = TaskOptions()

    assert options_of(_never) is None
    assert options_of(Lookalike()) is None
    assert options_of(3) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "no name"),
        ("name", ""),
        ("name", "a..b"),
        ("pool", "no pool"),
        ("pool", None),
        ("priority", 101),
        ("priority", 1.5),
        ("timeout", 0),
        ("timeout", "1s"),
        ("max_attempts", 0),
        ("backoff", 3),
        ("memory_limit", -1),
        ("metadata", {"a": object()}),
        ("metadata", [1]),
        ("on_lost", "shrug"),
        ("on_disconnect", "stop"),
        ("loop", "curio"),
    ],
)
def test_a_wrong_option_is_named_at_decoration(name: str, value: Any) -> None:
    options: Any = {name: value}
    with pytest.raises(ValueError, match=rf"^@task on .*\._never: {name} = "):
        task(**options)(_never)
    assert options_of(_never) is None


def test_a_loop_for_a_function_without_one_is_refused() -> None:
    with pytest.raises(ValueError, match="loop = 'trio'"):
        task(loop="trio")(_never)


def test_only_functions_at_module_level() -> None:
    def inner() -> None: ...

    class Holder:
        def method(self) -> None: ...

    for function in (inner, Holder.method, lambda: None):
        with pytest.raises(ValueError, match="top level of a module"):
            task(function)
    not_functions: list[Any] = [Holder, "name", print]
    for thing in not_functions:
        with pytest.raises(TypeError, match="@task is for functions"):
            task(thing)


def test_kinds_of_functions() -> None:
    def sync() -> None: ...
    def generator() -> Any:
        yield

    async def coroutine() -> None: ...
    async def async_generator() -> Any:
        yield

    functions = (sync, generator, coroutine, async_generator)
    assert [is_async(it) for it in functions] == [False, False, True, True]
    assert [is_generator(it) for it in functions] == [False, True, False, True]


def test_a_soft_timeout_is_shorter_than_the_timeout() -> None:
    with pytest.raises(ValueError, match=r"soft_timeout = 5.0: it must be shorter than timeout = 5.0"):
        make_options("here", {"soft_timeout": 5, "timeout": 5})
    assert make_options("here", {"soft_timeout": 4, "timeout": 5}).soft_timeout == 4
