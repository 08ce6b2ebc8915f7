"""A real MLflow server in a process of its own, and a door before it that can be shut."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 300  # seconds that a server may take to start, on a busy machine too


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """`mlflow server` on 127.0.0.1.

    Args:
        folder: Of its artifacts and of what it says.
        store: Where it keeps runs; a SQLite file in ``folder`` where it is empty.
    """

    def __init__(self, folder: Path, store: str = "") -> None:
        self.folder, self.port = folder, free_port()
        self.store = store or f"sqlite:///{folder}/server.db"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, again on the same port, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "server_artifacts")]
        with (self.folder / "server.txt").open("ab") as said:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=said, stderr=said, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            text = (self.folder / "server.txt").read_text(errors="replace")
            assert self.process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.2)

    def kill(self) -> None:
        """End it and its workers, as a crash does."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextlib.contextmanager
def mlflow_server(folder: Path, store: str = "") -> Iterator[MlflowServer]:
    """A server that answers, for as long as the block lasts."""
    server = MlflowServer(folder, store)
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Door:
    """Passes connections on to a port; while it is shut, they are refused and open ones cut."""

    def __init__(self, behind: int) -> None:
        self.behind, self.port = behind, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._listener: socket.socket | None = None
        self._pairs: list[socket.socket] = []
        self._lock = threading.Lock()

    def open(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port))
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for end in self._pairs:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self._pairs.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                guest, _ = listener.accept()
                host = socket.create_connection(("127.0.0.1", self.behind))
                with self._lock:
                    self._pairs += [guest, host]
                threading.Thread(target=_carry, args=(guest, host), daemon=True).start()


def _carry(guest: socket.socket, host: socket.socket) -> None:
    other = {guest: host, host: guest}
    with contextlib.suppress(OSError), guest, host, selectors.DefaultSelector() as ready:
        for end in other:
            ready.register(end, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(65536)
                if not data:
                    return
                other[key.fileobj].sendall(data)
