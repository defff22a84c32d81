"""Limits on bodies, times and connections, and headers that isolate the page from other pages.

`Guard` wraps the application and limits requests. `PatientProtocol` limits connections, including those that have not
sent the headers of a request yet.
"""

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_BYTES = 64 * 2**10  # of a body; a long drawing needs 20 KiB
MOST_DRAINED = 8 * 2**20  # bytes read of a too large body, as most clients read the answer only after sending
MOST_AHEAD = 2**20  # bytes of further requests that a client may send before the answer to the first
BODY_SECONDS = 5.0  # from the headers of a request to the last byte of its body
HEADER_SECONDS = 5.0  # from the start of a connection to the last header of a request
EXCHANGE_SECONDS = 20.0  # from the first byte of a request to the last byte of its answer
MOST_CONNECTIONS = 500  # at the same time; most systems allow a process 1,024 open files
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",
}


class TooLarge(Exception):
    """A body is larger than the limit."""


class Guard:
    """An ASGI application that wraps another one: it limits bodies and adds `HEADERS` to every answer.

    It reads the whole body first. A body that is too large, too slow or not declared as JSON is refused.
    """

    def __init__(self, app, most_bytes=MOST_BYTES, body_seconds=BODY_SECONDS):
        self.app, self.most_bytes, self.body_seconds = app, most_bytes, body_seconds
        self._headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self._headers]}
            await send(message)

        try:
            body = await asyncio.wait_for(self._read(scope, receive), self.body_seconds)
        except TooLarge:
            text = f"the body has more than {self.most_bytes:,} bytes: send fewer points"
            await refuse(send_with_headers, 413, text)
        except asyncio.TimeoutError:
            text = f"the body did not arrive within {self.body_seconds:g} seconds: try again"
            await refuse(send_with_headers, 408, text)
        else:
            kind = content_type(scope)
            if body is None:  # the client has closed the connection
                return
            # A form on another page cannot send this type, so that other pages cannot use the server.
            if scope["method"] == "POST" and kind != "application/json":
                text = f"expected the content-type application/json, not {kind[:50]!r}"
                await refuse(send_with_headers, 415, text)
                return
            await self.app(scope, replay(body, receive), send_with_headers)

    async def _read(self, scope, receive):
        """Return the body, or None if the client disconnects. Raise `TooLarge` after reading most of a large body."""
        headers = dict(scope["headers"])
        announced = headers.get(b"content-length", b"0")
        large = not announced.isdigit() or len(announced) > 18 or int(announced) > self.most_bytes
        if large and headers.get(b"expect", b"").lower() == b"100-continue":
            raise TooLarge  # the client waits for permission and has not sent the body
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            large = large or size > self.most_bytes
            if large:
                parts.clear()
            else:
                parts.append(part)
            if size > MOST_DRAINED:
                break
        if large:
            raise TooLarge
        return b"".join(parts)


def content_type(scope):
    """Return the content type of a request in lower case, without parameters, or "" if it has none."""
    named = dict(scope["headers"]).get(b"content-type", b"")
    return named.decode("latin-1").partition(";")[0].strip().lower()


def replay(body, receive):
    """Return a `receive` function that returns `body` first, and then the messages of the original one."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed():
        return messages.pop() if messages else await receive()

    return replayed


async def refuse(send, status, text):
    """Answer with a status and a sentence, and close the connection, because part of the body may be unread."""
    body = json.dumps({"detail": text}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class PatientProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1 protocol with a deadline for every connection and a limit on their number.

    Uvicorn closes idle connections after an answer. But it waits without limit for slow headers and for a client that
    does not read its answer, and it accepts any number of connections. In this class a connection must complete each
    stage of a request before a deadline.
    """

    header_seconds, exchange_seconds, most_connections = HEADER_SECONDS, EXCHANGE_SECONDS, MOST_CONNECTIONS
    _end = None  # the timer of the deadline
    _waiting = True  # whether no byte of the next request has arrived

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            self._say(503, "too many connections: try again in a second", b"retry-after: 1\r\n")
            transport.close()
            self._end_in(1)
            return
        self._end_in(self.header_seconds)

    def data_received(self, data):
        if self.transport.is_closing():
            return
        if self._waiting:
            self._waiting = False
            if self.cycle is not None:  # the time of the first request began with the connection
                self._end_in(self.header_seconds)
        cycle = self.cycle
        super().data_received(data)
        if self.cycle is not cycle:  # the headers are complete
            self._end_in(self.exchange_seconds)
        if len(self.conn.trailing_data[0]) > MOST_AHEAD:  # uvicorn stores requests that arrive early
            self.transport.abort()

    def on_response_complete(self):
        cycle = self.cycle
        self._waiting = True
        self._end_in(self.timeout_keep_alive + 5)  # a close may wait for a slow reader
        super().on_response_complete()
        if self.cycle is not cycle:  # the next request has already arrived
            self._waiting = False
            self._end_in(self.exchange_seconds)

    def connection_lost(self, exc):
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)

    def _end_in(self, seconds):
        if self._end is not None:
            self._end.cancel()
        self._end = self.loop.call_later(seconds, self._give_up)

    def _give_up(self):
        between_requests = self.cycle is None or self.cycle.response_complete
        if between_requests and not self.transport.is_closing() and not self.transport.get_write_buffer_size():
            self._say(408, f"the headers did not arrive within {self.header_seconds:g} seconds: try again")
            self.transport.close()  # sends the buffered answer first; the timer aborts a client that does not read it
            self._end_in(1)
        else:
            self.transport.abort()

    def _say(self, status, text, headers=b""):
        """Write an answer to the connection directly, because there is no complete request to answer."""
        body = json.dumps({"detail": text}).encode()
        phrase = {408: b"Request Timeout", 503: b"Service Unavailable"}[status]
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n%s\r\n%s"
            % (status, phrase, len(body), headers, body)
        )
