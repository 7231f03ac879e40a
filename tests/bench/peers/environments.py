"""Installs the peers, each into a virtual environment of its own, kept between runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: Debian packages by the command they bring.
DEBIAN = {
    "nginx": ("nginx", "libnginx-mod-nchan"),
    "redis-server": ("redis-server",),
    "postgres": ("postgresql",),
}


def folder() -> Path:
    """Return where the environments are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "bulkhead-bench"


def python_of(name: str, requirements: Sequence[str], interpreter: str = sys.executable) -> Path:
    """Return the interpreter of an environment with exactly these requirements, made when it is not there yet.

    `interpreter` makes it: this one, or another.

    Raises:
      RuntimeError: they cannot be installed; the message has pip's words.
    """
    ask = [interpreter, "-c", "import sys; print(sys.version)"]
    version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\n".join([version, *requirements]).encode()).hexdigest()[:8]
    home = folder() / f"{name}-{digest}"
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    print(f"installing {name} into {home}", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", home], check=True)
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} cannot be installed: {done.stderr.strip()[-2000:]}")
    (home / "complete").touch()
    return python


def versions_of(python: Path) -> dict[str, str]:
    """Return what is installed there, by name."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split("==") for line in listed.stdout.split())


def debian(command: str) -> str:
    """Return the path of a server's command, after installing its Debian packages when this is root.

    Raises:
      RuntimeError: it is not there and cannot be installed; the message says how.
    """
    packages = DEBIAN[command]
    installed = (
        subprocess.run(["dpkg", "--status", *packages], capture_output=True, check=False).returncode == 0
    )
    if not installed:
        install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
        if os.geteuid() or subprocess.run(install, stdout=sys.stderr, check=False).returncode:
            raise RuntimeError(f"a peer needs Debian packages: sudo {' '.join(install)}")
    found = shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:  # Debian's postgres is in a folder with its version
        candidates = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{command}"))
        if not candidates:
            raise RuntimeError(f"{' '.join(packages)} brought no {command}")
        found = str(candidates[-1])
    return found
