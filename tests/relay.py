"""A TCP relay that breaks connections off, as a bad network does.

    with relay(server_port, budgets=[300, 1000]) as line:
        ...                                  # clients use line.url
        line.wait_streams(2)                 # until the second event stream has begun
        line.answers()                       # all that came back, connection by connection
        line.gate.clear()                    # connections from now on wait for line.gate.set()

The n-th answer that is an event stream breaks off once so many bytes of it have gone through, or, where the budget is
a pattern, right behind its match; those beyond the list are left whole, and so is every other answer. A client gets all
that went through before the break, which is a FIN. With `reset` it is a RST, a moment later: a reset throws away what
the client hasn't read yet, its first event id perhaps (that case is what `?key=` is for).
"""

import re
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle

__all__ = ["Relay", "relay"]

#: So long a client has to read what came before a reset.
RESET_AFTER_S = 0.2
#: A socket is reset when no thread waits in it any more: each looks so often whether it is still wanted.
LOOK_EACH_S = 0.1


class Relay:
    """See above; made by `relay`."""

    def __init__(self, ports: Sequence[int], budgets: Sequence[int | re.Pattern[bytes]], *, reset: bool) -> None:
        self._ports = cycle(ports)
        self._budgets = list(budgets)
        self._reset = reset
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._answers: list[bytearray] = []
        self._streams = 0
        self.gate = threading.Event()
        self.gate.set()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def wait_streams(self, count: int, limit_s: float = 20) -> None:
        """Wait until so many event streams have begun."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._streams >= count, limit_s):
                ends = "\n".join(repr(bytes(answer[-300:])) for answer in self._answers)
                raise AssertionError(f"{self._streams} streams only, not {count}; the answers ended with\n{ends}")

    def answers(self) -> list[bytes]:
        """All that came back, connection by connection."""
        with self._changed:
            return [bytes(answer) for answer in self._answers]

    def cut(self) -> None:
        """Break off all connections that are open now."""
        for sock in self._sockets[:]:
            self._break(sock)

    def close(self) -> None:
        self.gate.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(5)
        self._listener.close()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.gate.wait()
                try:
                    server = socket.create_connection(("127.0.0.1", next(self._ports)))
                except OSError:  # nobody listens there at the moment
                    client.close()
                    continue
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [client, server]
                with self._changed:
                    answer = bytearray()
                    self._answers.append(answer)
                self._start(self._pump, client, server, None)
                self._start(self._pump, server, client, answer)

    def _pump(self, source: socket.socket, sink: socket.socket, answer: bytearray | None) -> None:
        budget: int | re.Pattern[bytes] | None = None
        begun = 0
        with suppress(OSError, ValueError):  # a socket that another thread has closed
            while data := self._received(source):
                if answer is not None and b"content-type: text/event-stream" in data.lower():
                    with self._changed:
                        budget, begun = self._budgets.pop(0) if self._budgets else None, len(answer)
                        self._streams += 1
                        self._changed.notify_all()
                if isinstance(budget, re.Pattern) and answer is not None:
                    come = bytes(answer[begun:])
                    if match := budget.search(come + data):
                        budget = max(match.end() - len(come), 1)
                if isinstance(budget, int):
                    data, budget = data[:budget], budget - len(data[:budget])
                if answer is not None:  # kept before it is sent: who has read it finds it here
                    with self._changed:
                        answer += data
                sink.sendall(data)
                if budget == 0:
                    if self._reset:
                        time.sleep(RESET_AFTER_S)
                    self._break(sink)
                    self._break(source)
                    return
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _received(self, source: socket.socket) -> bytes:
        while source in self._sockets:
            if select.select([source], [], [], LOOK_EACH_S)[0]:
                return source.recv(65536)
        return b""

    def _break(self, sock: socket.socket) -> None:
        if sock in self._sockets:
            self._sockets.remove(sock)
        with suppress(OSError):
            if self._reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                sock.shutdown(socket.SHUT_RDWR)
        sock.close()


@contextmanager
def relay(
    port: int | Sequence[int], budgets: Sequence[int | re.Pattern[bytes]] = (), *, reset: bool = False
) -> Iterator[Relay]:
    """A relay in front of a port of this machine, or of several, which get the connections in turn."""
    line = Relay([port] if isinstance(port, int) else port, budgets, reset=reset)
    try:
        yield line
    finally:
        line.close()
