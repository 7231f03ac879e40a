"""`bulkhead vacuum` asks until nothing is left, or nothing comes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from supervisor.cli import exits, main, upkeep


class Vacuuming:
    """Answers with what each request has freed and left."""

    def __init__(self, *answers: tuple[int, int]) -> None:
        self.answers = list(answers)

    def vacuum(self) -> dict[str, Any]:
        freed, left = self.answers.pop(0)
        return {
            "freed_bytes": freed,
            "free_bytes": left,
            "file_bytes": 2**20,
            "incremental": True,
            "seconds": 0.5,
        }


@pytest.mark.parametrize(
    ("answers", "freed"),
    [([(0, 0)], 0), ([(100, 0)], 100), ([(100, 50), (50, 0)], 150), ([(100, 50), (0, 60)], 100)],
)
def test_it_comes_to_an_end(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: list[tuple[int, int]],
    freed: int,
) -> None:
    client = Vacuuming(*answers)
    monkeypatch.setattr(upkeep, "connected", lambda *_: client)
    assert main.main(["vacuum", "--json"]) == exits.OK
    answer = json.loads(capsys.readouterr().out)
    assert (answer["freed_bytes"], answer["seconds"]) == (freed, 0.5 * len(answers))
    assert client.answers == []


def test_people_get_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(upkeep, "connected", lambda *_: Vacuuming((3 * 2**20, 0)))
    assert main.main(["vacuum"]) == exits.OK
    assert capsys.readouterr().out == "Freed 3.0 MiB; the store has 1.0 MiB.\n"
