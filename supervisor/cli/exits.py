"""Exit codes of the command `bulkhead`; for ever (CONTRACT §5)."""

from __future__ import annotations

from typing import Final

#: fine; a followed run was successful; the tree runs
OK: Final = 0
#: killed on the second signal; a run that failed; the gateway refused; the tree does not run
FAILED: Final = 1
#: bad configuration, import or usage
BAD_CONFIGURATION: Final = 2
#: another supervisor holds the state directory
ALREADY_RUNNING: Final = 3
#: a child had to be restarted too often
GAVE_UP: Final = 4
