"""What one supervisor is started with. Pure data; `daemon.serve` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Config:
    """The wishes of whoever starts the tree.

    Attributes:
      settings_module: dotted name of the Django settings.
      overrides: settings given as flags, by upper-case key; they stand over environment and project.
      path: put in front of `sys.path` in the processes that import the project.
      demo: the project is the demo; its own database is migrated by the zygote.
      ready_fd: the command line writes a newline there, and closes it, when the tree is READY.
      quiet: say nothing on standard output.
    """

    settings_module: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    demo: bool = False
    ready_fd: int | None = None
    quiet: bool = False

    def apply(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the project's plain `settings` under the flags.

        A flag for one address stands over a setting for the other kind (BIND, UDS). POOLS is merged pool by
        pool, key by key, so that `--runners` keeps the project's other pools and limits.
        """
        merged = {**settings, **{key: value for key, value in self.overrides.items() if key != "POOLS"}}
        if "BIND" in self.overrides:
            merged["UDS"] = None
        if pools := self.overrides.get("POOLS"):
            known = dict(settings.get("POOLS") or {})
            merged["POOLS"] = {**known, **{name: {**known.get(name, {}), **pools[name]} for name in pools}}
        return merged
