"""Things that tests break and mend: a PostgreSQL server, a small disk."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.processes import FOLDER_PREFIX

_ROOT = Path(__file__).resolve().parent.parent


def _program(name: str) -> str:
    """Return the path of a PostgreSQL program; Debian keeps those of a server beside the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return str(found[-1]) if found else shutil.which(name) or name


class Postgres:
    """A private server without a network address, in a directory of its own; a context manager.

    It runs as an ordinary user, as it refuses root.

    Args:
      options: settings of the server, `name=value`; by default it does not wait for the disk.
    """

    def __init__(self, *options: str) -> None:
        self._options = options or ("fsync=off",)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}pg-", dir="/tmp"))
        self._data = self.folder / "data"
        self._who: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = next(pwd.getpwnam(name) for name in ("postgres", "nobody") if _exists(name))
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Postgres:
        command = [_program("initdb"), "-D", str(self._data), "-U", "bulkhead", "-A", "trust", "--no-sync"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=60, **self._who)
        try:
            self.start()
            self._run("createdb", "-h", str(self.folder), "-U", "bulkhead", "bulkhead")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        self.stop(signal.SIGINT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run([_program(program), *arguments], check=True, cwd="/", timeout=30, **self._who)

    def settings(self) -> dict[str, Any]:
        """Return Django's settings for it."""
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "bulkhead",
            "USER": "bulkhead",
            "HOST": str(self.folder),
        }

    def environment(self) -> dict[str, str]:
        """Return the environment in which tests.project uses it."""
        return {"BULKHEAD_TEST_DATABASE": json.dumps(self.settings())}

    def migrate(self) -> None:
        """Make the tables of tests.project."""
        subprocess.run(
            [sys.executable, "-m", "django", "migrate", "--run-syncdb", "--verbosity=0"],
            check=True,
            timeout=60,
            cwd=_ROOT,
            env=os.environ
            | self.environment()
            | {"DJANGO_SETTINGS_MODULE": "tests.project.settings", "PYTHONPATH": str(_ROOT)},
        )

    @property
    def pid(self) -> int:
        """Of the server."""
        assert self._process is not None, "it is not started"
        return self._process.pid

    def start(self) -> None:
        """Start it; return when it takes connections."""
        options = ["-k", str(self.folder), "-c", "listen_addresses="]
        options += [part for one in self._options for part in ("-c", one)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [_program("postgres"), "-D", str(self._data), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                **self._who,
            )
        end = time.monotonic() + 20
        command = [_program("pg_isready"), "-q", "-h", str(self.folder)]
        while subprocess.run(command, check=False).returncode != 0:
            assert time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGQUIT) -> None:
        """Stop it; by default at once, as `pg_ctl stop -m immediate` does."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(number)
            process.wait(20)

    def freeze(self) -> None:
        """Stop all of its processes in their tracks: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            server = psutil.Process(self._process.pid)
            for process in [server, *server.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)


def _exists(user: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(user))
    return False


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path | None]:
    """Give an empty directory on a file system of `size` bytes, or None where mounting is not allowed."""
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}fs-", dir="/tmp"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
        try:
            yield folder if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(folder)], check=True)
    finally:
        folder.rmdir()


class Ballast:
    """A file that takes up all the space that is left, until it is removed; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ballast"

    def __enter__(self) -> Ballast:
        self.fill()
        return self

    def fill(self) -> None:
        """Take what is left. Again, for what was set free since."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            for size in (65536, 512, 1):
                with contextlib.suppress(OSError):
                    while os.write(fd, bytes(size)):
                        pass
        finally:
            os.close(fd)

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
