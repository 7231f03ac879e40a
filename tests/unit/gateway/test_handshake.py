"""Which requests become a WebSocket."""

from __future__ import annotations

import h11
import pytest

from gateway import handshake
from tests.websockets import ACCEPT, upgrade


def parsed(data: bytes) -> h11.Request:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    return request


def test_the_example_of_the_rfc() -> None:
    request = parsed(upgrade("/chat"))
    assert handshake.is_asked_for(request)
    assert handshake.complaint(request) is None
    assert handshake.answer_to(request, None)[-1] == (b"Sec-WebSocket-Accept", ACCEPT.encode())


@pytest.mark.parametrize("value", ["websocket", "WebSocket", "h2c, websocket", "h2c,\tWEBSOCKET"])
def test_the_upgrade_may_be_one_of_several(value: str) -> None:
    request = parsed(upgrade("/").replace(b"Upgrade: websocket", f"Upgrade: {value}".encode()))
    assert handshake.is_asked_for(request)


@pytest.mark.parametrize("value", ["", "websockets", "websocket/13", "web socket"])
def test_another_protocol_is_none(value: str) -> None:
    request = parsed(upgrade("/").replace(b"Upgrade: websocket", f"Upgrade: {value}".encode()))
    assert not handshake.is_asked_for(request)


def test_a_request_with_a_body_is_none() -> None:
    assert not handshake.is_asked_for(parsed(upgrade("/", "Transfer-Encoding: chunked")))


def test_subprotocols_keep_their_order_over_several_headers() -> None:
    request = parsed(upgrade("/", "Sec-WebSocket-Protocol: b, ,A", "Sec-WebSocket-Protocol: c"))
    assert handshake.subprotocols(request) == ["b", "A", "c"]
    assert (b"Sec-WebSocket-Protocol", b"A") in handshake.answer_to(request, "A")
