"""What a task prints and logs, through a real pipe into the gateway's parser."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

import pytest

from gateway.output import Line, OutputParser
from taskkit import linux
from taskkit.runner import capture


class Captured:
    """The read end of descriptor 1 and 2, with the parser behind it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._parser = OutputParser(1_000_000)

    def lines(self) -> dict[str, list[Line]]:
        """Return the lines since the last call, by token."""
        found: dict[str, list[Line]] = {}
        while linux.bytes_to_read(self._fd):
            for token, lines in self._parser.receive(os.read(self._fd, 65536), 0.0).items():
                found.setdefault(token, []).extend(lines)
        return found

    def texts(self, token: str = "tok") -> list[str]:
        """Return the texts of one attempt since the last call."""
        return [line.text for line in self.lines().get(token, [])]


@contextlib.contextmanager
def capturing() -> Iterator[Captured]:
    """Install capture as a runner does, and undo it. Inside the test: pytest moves descriptor 1 between phases."""
    read, write = os.pipe()
    linux.set_pipe_size(write, 1 << 20)
    kept: tuple[TextIO, TextIO] = (sys.stdout, sys.stderr)
    saved = [os.dup(1), os.dup(2)]
    root = logging.getLogger()
    handlers = list(root.handlers)
    root.handlers[:] = []  # pytest's own would raise where logging only complains
    try:
        capture.install(write)
        yield Captured(read)
    finally:
        for fd, original in zip((1, 2), saved, strict=True):
            os.dup2(original, fd)
            os.close(original)
        sys.stdout, sys.stderr = kept
        root.handlers[:] = handlers
        capture.attempt_token.set("")
        os.close(write)
        os.close(read)


@contextlib.contextmanager
def _attempt(token: str = "tok") -> Iterator[None]:
    capture.begin(token)
    yield
    capture.end(token)


def test_printed_lines_come_with_their_stream() -> None:
    with capturing() as captured:
        with _attempt():
            print("out", 1)
            print("err é", file=sys.stderr)
        assert captured.lines() == {"tok": [Line("stdout", "out 1"), Line("stderr", "err é")]}


def test_empty_lines_are_lines() -> None:
    with capturing() as captured:
        with _attempt():
            print()
            print("a\n\nb")
        assert captured.texts() == ["", "a", "", "b"]


def test_a_line_is_told_when_it_ends() -> None:
    with capturing() as captured:
        with _attempt():
            print("half", end="")
            assert captured.texts() == []
            print(" and half")
            assert captured.texts() == ["half and half"]
            print("rest", end="")
        assert captured.texts() == ["rest"]


def test_what_comes_past_python_belongs_to_the_attempt_as_well() -> None:
    with capturing() as captured:
        with _attempt():
            os.write(1, b"from C\n")
            subprocess.run(
                [sys.executable, "-c", "import os; os.write(2, b'from a child')"], check=True, timeout=30
            )
        assert captured.lines() == {"tok": [Line("output", "from C"), Line("output", "from a child")]}


def test_logging_keeps_level_logger_and_line_breaks() -> None:
    with capturing() as captured:
        with _attempt():
            logging.getLogger("a.b").warning("one\ntwo %s", "é")
        assert captured.lines() == {"tok": [Line("logging", "one\ntwo é", "WARNING", "a.b")]}


def test_a_logged_exception_brings_its_traceback() -> None:
    with capturing() as captured:
        with _attempt():
            try:
                raise ValueError("no")
            except ValueError:
                logging.getLogger("a").exception("failed")
        (line,) = captured.lines()["tok"]
        assert line.text.startswith("failed\nTraceback")
        assert line.text.endswith("ValueError: no")


def test_a_log_call_that_is_wrong_does_not_end_the_task() -> None:
    with capturing() as captured:
        with _attempt():
            logging.getLogger("a").warning("%d", "no number")
        assert any("Logging error" in text for text in captured.texts())


@pytest.mark.parametrize("letter", ["a", "é", "漢", "😀", "\x1b", '"', "\\", "\x00", "\ud800"])
@pytest.mark.parametrize("length", [1, 8_191, 8_192, 8_193, 30_000])
@pytest.mark.parametrize("how", ["print", "log"])
def test_lines_of_every_length_stay_records(letter: str, length: int, how: str) -> None:
    with capturing() as captured:
        with _attempt():
            if how == "print":
                print(letter * length)
            else:
                logging.getLogger("a").warning("%s", letter * length)
        lines = captured.lines()["tok"]
        assert {line.stream for line in lines} == {"stdout" if how == "print" else "logging"}
        text = "".join(line.text for line in lines)
        expected = letter.encode("utf-8", "backslashreplace").decode().replace("\0", "␀")
        # A printed line is told wholly, in pieces; a log record is one line, cut.
        assert text == expected * (length if how == "print" else min(length, 8_192))
        assert how == "print" or len(lines) == 1


def test_a_progress_bar_that_never_ends_its_line_is_cut() -> None:
    with capturing() as captured:
        with _attempt():
            for n in range(2_000):
                print(f"\r{n:9}", end="")
        texts = captured.texts()
        assert len(texts) == 3
        assert all(len(text) <= 8_192 for text in texts)


def test_lines_of_threads_are_never_mixed() -> None:
    with capturing() as captured:

        def speak(name: str) -> None:
            capture.attempt_token.set("tok")
            for n in range(200):
                print(f"{name} {n} " + name * 50)

        with _attempt():
            threads = [threading.Thread(target=speak, args=(name,)) for name in "abcd"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        texts = captured.texts()
        for name in "abcd":
            mine = [text for text in texts if text.startswith(name)]
            assert mine == [f"{name} {n} " + name * 50 for n in range(200)]


def test_a_shared_pool_tells_attempts_apart_by_the_context() -> None:
    with capturing() as captured:
        import contextvars

        def speak(token: str) -> None:
            capture.attempt_token.set(token)
            print(f"I am {token}")
            logging.getLogger("x").warning("I log as %s", token)

        for token in ("one", "two"):
            contextvars.copy_context().run(speak, token)
        found = captured.lines()
        assert {token: [line.text for line in lines] for token, lines in found.items()} == {
            "one": ["I am one", "I log as one"],
            "two": ["I am two", "I log as two"],
        }


def test_half_lines_of_two_attempts_in_one_process_are_never_joined() -> None:
    import contextvars

    with capturing() as captured:
        contexts = {token: contextvars.copy_context() for token in ("one", "two")}
        for token, context in contexts.items():
            context.run(capture.attempt_token.set, token)
        contexts["one"].run(print, "secret of one", end="")
        contexts["two"].run(print, "line of two")
        assert captured.texts("two") == ["line of two"]
        capture.finish_lines("one")
        assert captured.texts("one") == ["secret of one"]


def test_half_lines_of_threads_are_told_at_the_end() -> None:
    with capturing() as captured:
        with _attempt():
            thread = threading.Thread(target=print, args=("from a thread",), kwargs={"end": ""})
            thread.start()
            thread.join(10)
        assert captured.texts() == ["from a thread"]


def test_one_attempt_after_another() -> None:
    with capturing() as captured:
        with _attempt("one"):
            os.write(1, b"first, without an end")
        os.write(1, b"between\n")
        with _attempt("two"):
            os.write(1, b"second\n")
        found = captured.lines()
        assert {token: [line.text for line in lines] for token, lines in found.items()} == {
            "one": ["first, without an end"],
            "": ["between"],
            "two": ["second"],
        }


@pytest.mark.parametrize("spoil", [lambda: os.close(1), lambda: os.dup2(os.open(os.devnull, os.O_RDONLY), 1)])
def test_a_task_that_closes_its_output_goes_on(spoil: Callable[[], object]) -> None:
    with capturing() as captured:
        with _attempt():
            spoil()
            print("nobody hears this")
            logging.getLogger("a").warning("nor this")
        assert captured.lines() == {}


def test_the_streams_are_what_code_expects_of_them() -> None:
    with capturing() as captured:
        assert sys.stdout.writable()
        assert not sys.stdout.isatty()
        assert sys.stdout.fileno() == 1
        assert (sys.stdout.encoding, sys.stdout.name, sys.stderr.name) == ("utf-8", "<stdout>", "<stderr>")
        with _attempt():
            sys.stdout.buffer.write(b"bytes\n")
            sys.stdout.writelines(["a\n", "b\n"])
            sys.stdout.flush()
            with pytest.raises(TypeError, match="bytes"):
                sys.stdout.write(b"x")  # type: ignore[arg-type]  # the mistake under test
        assert captured.texts() == ["bytes", "a", "b"]
