"""The tree of errors: each tells itself apart, all are on page one."""

from __future__ import annotations

import inspect
import re
from typing import TypeVar

import pytest

from taskkit import errors
from taskkit.errors import SubmitError, SupervisorError

ERRORS = {
    name: cls
    for name, cls in inspect.getmembers(errors, inspect.isclass)
    if cls.__module__ == errors.__name__
}


_T = TypeVar("_T")


def all_subclasses(cls: type[_T]) -> list[type[_T]]:
    """Return the subclasses of a class, theirs included."""
    found: list[type[_T]] = []
    for sub in cls.__subclasses__():
        found += [sub, *all_subclasses(sub)]
    return found


SUBMIT_ERRORS: list[type[SubmitError]] = all_subclasses(SubmitError)


def test_submit_errors_have_distinct_codes_and_statuses() -> None:
    classes: list[type[SubmitError]] = [SubmitError, *SUBMIT_ERRORS]
    assert len(SUBMIT_ERRORS) >= 6
    assert len({cls.code for cls in classes}) == len(classes)
    assert len({cls.status for cls in SUBMIT_ERRORS}) == len(SUBMIT_ERRORS)


@pytest.mark.parametrize("cls", SUBMIT_ERRORS, ids=lambda cls: cls.__name__)
def test_a_submit_error_is_a_client_or_server_problem_of_its_own(cls: type[SubmitError]) -> None:
    assert "code" in vars(cls), "inherited: nobody could tell it from its base"
    assert "status" in vars(cls)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cls.code)
    assert 400 <= cls.status < 600


def test_submit_errors_carry_what_the_caller_needs() -> None:
    error = errors.QueueFull("full", errors={"n": "bad"}, retry_after=2.0, run="id")
    assert (str(error), error.errors, error.retry_after, error.run) == ("full", {"n": "bad"}, 2.0, "id")


@pytest.mark.parametrize("name", ERRORS)
def test_page_one_shows_the_whole_tree(name: str) -> None:
    assert re.search(rf"\b{name}\b", errors.__doc__ or "")


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_says_what_it_means(name: str) -> None:
    assert (ERRORS[name].__doc__ or "").strip()


@pytest.mark.parametrize(
    "cls", [SupervisorError, *all_subclasses(SupervisorError)], ids=lambda cls: cls.__name__
)
def test_exit_codes_are_those_of_the_contract(cls: type[SupervisorError]) -> None:
    assert cls.exit_code in (2, 3, 4)


def test_cancellation_is_not_eaten_by_except_exception() -> None:
    assert not issubclass(errors.RunCancelled, Exception)
