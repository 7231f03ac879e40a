"""The client's calls about schedules. Imports no Django."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from taskkit import calls

_PATH = "/api/v1/schedules"


def _page_call(cursor: str | None) -> calls.Call:
    return calls.Call(path=_PATH, params={"limit": 100} | ({} if cursor is None else {"cursor": cursor}))


def _create_call(
    task: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> calls.Call:
    body = {"task": task, "args": list(args) or None, "kwargs": kwargs or None, **given}
    told = {name: value for name, value in body.items() if value is not None}
    return calls.Call(method="POST", path=_PATH, body=told)  # twice the same is one


def _order_call(schedule: str, order: str) -> calls.Call:
    path = f"{_PATH}/{quote(schedule, safe='')}"
    if order == "delete":
        return calls.Call(method="DELETE", path=path, repeatable=False)  # the second one meets none
    return calls.Call(method="POST", path=f"{path}/{quote(order, safe='')}")


def _told(response: httpx.Response, schedule: str) -> dict[str, Any]:
    return {"id": schedule, "deleted": True} if response.status_code == 204 else calls.document(response)


class ScheduleCalls:
    """Makes, lists, switches and removes schedules: a part of `taskkit.client.Client`."""

    def _send(self, call: calls.Call) -> httpx.Response:
        raise NotImplementedError

    async def _asend(self, call: calls.Call) -> httpx.Response:
        raise NotImplementedError

    def create_schedule(
        self, task: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **given: Any
    ) -> dict[str, Any]:
        """Make a schedule, or find the same one.

        `given`: one of `cron` (with `tz`), `every` (seconds), `at` (RFC 3339); `name`, `overlap`, `catchup`, `enabled`;
        what a submission may say: pool, priority, timeout, max_attempts, metadata, tags.
        """
        return calls.document(self._send(_create_call(task, args, kwargs, given)))

    async def acreate_schedule(
        self, task: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **given: Any
    ) -> dict[str, Any]:
        """Make a schedule: see `create_schedule`."""
        return calls.document(await self._asend(_create_call(task, args, kwargs, given)))

    def all_schedules(self) -> Iterator[dict[str, Any]]:
        """Yield every schedule that the token reaches, by name."""
        cursor = None
        while True:
            page = calls.document(self._send(_page_call(cursor)))
            yield from page["schedules"]
            if (cursor := page["next"]) is None:
                return

    async def aall_schedules(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield every schedule: see `all_schedules`."""
        cursor = None
        while True:
            page = calls.document(await self._asend(_page_call(cursor)))
            for schedule in page["schedules"]:
                yield schedule
            if (cursor := page["next"]) is None:
                return

    def order_schedule(self, schedule: str, order: str) -> dict[str, Any]:
        """Have a schedule enabled, disabled or removed: `order` is "enable", "disable" or "delete"."""
        return _told(self._send(_order_call(schedule, order)), schedule)

    async def aorder_schedule(self, schedule: str, order: str) -> dict[str, Any]:
        """Have a schedule enabled, disabled or removed: see `order_schedule`."""
        return _told(await self._asend(_order_call(schedule, order)), schedule)
