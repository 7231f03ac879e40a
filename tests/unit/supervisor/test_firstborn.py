"""The gateway that is forked ahead, with a small module in the gateway's place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Stands for the gateway: notes what it finds, then waits for the end of its socket.
MODULE = """
import json, os, signal, socket, sys

def main(argv):
    control = socket.socket(fileno=int(argv[1]))
    control.send(json.dumps({
        "argv": argv, "parent": os.getppid(),
        "rooms": [name for name in sys.modules if name.partition(".")[0] == "supervisor"],
        "open": [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")],
        "stdin": os.readlink("/proc/self/fd/0"),
        "hears": [n for n in (2, 15, 1) if signal.getsignal(n) != signal.SIG_IGN],
    }).encode())
    control.recv(1)
    return 7
"""

PROGRAM = """
import json, os, signal, socket, sys
from supervisor import firstborn
firstborn._MODULE = "stands_for_it"
secret = os.open("/dev/zero", os.O_RDONLY)
"""


def result_of(tmp_path: Path, code: str) -> Any:
    """Run PROGRAM and `code` in a process of their own; return the JSON that it prints."""
    (tmp_path / "stands_for_it.py").write_text(MODULE)
    program = f"import sys; sys.path.append({str(tmp_path)!r})\n{PROGRAM}{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    return json.loads(done.stdout)


def test_it_becomes_the_gateway_with_what_it_is_given(tmp_path: Path) -> None:
    found = result_of(
        tmp_path,
        "firstborn.bear()\n"
        "waiting = firstborn.pids()\n"
        "ours, theirs = socket.socketpair()\n"
        "pid = firstborn.take(['more'], theirs.fileno())\n"
        "theirs.close()\n"
        "found = json.loads(ours.recv(65536))\n"
        "ours.close()\n"
        "code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "print(json.dumps(found | {'known': waiting == {pid}, 'left': list(firstborn.pids()), 'code': code,\n"
        "                          'me': os.getpid(), 'again': firstborn.take([], 0)}))\n",
    )
    control = int(found["argv"][1])
    assert found["argv"] == ["gateway", str(control), "more"]
    assert set(found["open"]) <= {0, 1, 2, control}, "nothing of the supervisor's is left open in it"
    assert found["parent"] == found["me"]
    assert found["rooms"] == []
    assert found["stdin"] == "/dev/null"
    assert found["hears"] == []
    assert (found["known"], found["left"], found["code"], found["again"]) == (True, [], 7, None)


def test_one_that_has_died_is_none(tmp_path: Path) -> None:
    code = (
        "firstborn.bear()\n"
        "(pid,) = firstborn.pids()\n"
        "os.kill(pid, signal.SIGKILL)\n"
        "os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n"
        "print(json.dumps([firstborn.take([], secret), list(firstborn.pids())]))\n"
    )
    assert result_of(tmp_path, code) == [None, []]


def test_one_that_is_not_needed_leaves(tmp_path: Path) -> None:
    code = (
        "firstborn.bear()\n"
        "((pid, ours),) = firstborn._waiting\n"
        "ours.close()\n"
        "print(json.dumps(os.waitpid(pid, 0)[1]))\n"
    )
    assert result_of(tmp_path, code) == 0


def test_one_that_is_dismissed_is_gone(tmp_path: Path) -> None:
    code = (
        "firstborn.bear()\n"
        "(pid,) = firstborn.pids()\n"
        "firstborn.dismiss()\n"
        "print(json.dumps([os.path.exists(f'/proc/{pid}'), list(firstborn.pids())]))\n"
    )
    assert result_of(tmp_path, code) == [False, []]


def test_there_is_none_below_a_task_of_another_tree(tmp_path: Path) -> None:
    """What an exec leaves out of its environment, a fork would keep: the other tree's mark."""
    code = "os.environ['BULKHEAD_TREE'] = 'x'\nfirstborn.bear()\nprint(json.dumps(list(firstborn.pids())))\n"
    assert result_of(tmp_path, code) == []
