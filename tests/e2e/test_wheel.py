"""The wheel as a user gets it: complete, without tests, able to run outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that has to succeed; return its output."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PIP_", "DJANGO_"))
    }
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the wheel of this checkout, built without network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the bin folder of a fresh venv with the wheel; its dependencies are those of this interpreter."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=venv)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv).strip()
    # A path in a .pth file is only put behind: the editable installation there is not followed.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


def test_the_wheel_is_the_product(wheel: Path) -> None:
    assert wheel.name.startswith("django_bulkhead-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [name for name in names if name.endswith("/entry_points.txt")]
        commands = archive.read(entry_points).decode()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"supervisor", "gateway", "taskkit"}, "neither tests nor deploy"
    assert "taskkit/_demo/manage.py" in names
    assert "gateway/tasks.js" in names, "what the gateway serves to browsers"
    assert "taskkit/static/taskkit/stream.js" in names, "what a Django site serves to browsers"
    assert any(name.startswith("taskkit/migrations/0001") for name in names)
    assert [name for name in names if "__pycache__" in name or name.endswith((".sqlite3", ".pyc"))] == []
    assert "bulkhead = " in commands


def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in ("supervisor", "gateway", "taskkit"):
        files = [path for path in (ROOT / package).rglob("*") if path.is_file()]
        wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
        assert wanted - names == set(), "modules, templates, what is served as it is"


def test_bulkhead_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    told = run(installed / "bulkhead", "--help", cwd=tmp_path)
    assert "run" in told
    assert "demo" in told
    where = run(installed / "python", "-c", "import supervisor; print(supervisor.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent), "the wheel's copy, not the checkout's"


def test_python_dash_m_is_the_same_command(installed: Path, tmp_path: Path) -> None:
    assert "demo" in run(installed / "python", "-m", "supervisor", "--help", cwd=tmp_path)


def test_the_demo_project_is_in_the_wheel_and_works(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import taskkit; print(taskkit.__path__[0])", cwd=tmp_path)
    manage = Path(where.strip()) / "_demo" / "manage.py"
    run("env", f"BULKHEAD_DEMO_DIR={tmp_path}", installed / "python", manage, "check", cwd=tmp_path)
