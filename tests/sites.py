"""A Django site that serves beside a tree, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.helpers import ROOT, Tree, eventually, raw_get
from tests.processes import standing


@contextmanager
def serving(
    tree: Tree, settings: str, port: int, *, path: str, command: Sequence[str] | None = None
) -> Iterator[str]:
    """Serve the site of `settings` on `port` until the block ends; give its origin. `path` answers when it is up."""
    environment = tree.environment() | {
        "DJANGO_SETTINGS_MODULE": settings,
        "TASKKIT_STATE_DIR": str(tree.state_dir),
        "TASKKIT_URL": tree.url,
    }
    log = tree.state_dir / f"site-{port}.log"
    runserver = ("django", "runserver", "--noreload", "--insecure", f"127.0.0.1:{port}")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *(command or runserver)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
        )

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            with raw_get(f"http://127.0.0.1:{port}{path}") as response:
                return response.status == 200
        except OSError:
            return False

    with standing(process.pid):
        try:
            eventually(answers, 30, "the site")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)
