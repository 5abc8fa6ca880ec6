"""Says that this stage serves, and that it does so no longer, to whoever started it.

    --ready fd:N    one line, after others that say how far it is; a launcher reads them from a pipe
    --ready FILE    a file with this line, there as long as the stage serves: a probe is `test -e FILE`
    $NOTIFY_SOCKET  READY=1 and STOPPING=1, as sd_notify(3) has them: systemd's units of Type=notify

Without --ready the line is printed.
"""

import logging
import os
import select
import socket
from contextlib import suppress

from attest.document import write_file
from minigpt.errors import UsageError

log = logging.getLogger("minigpt.stage")

PATIENCE = 5.0  # seconds that a supervisor may take to read


class Readiness:
    """Args: place: that of --ready. What lies there of an earlier run is removed. Raises UsageError if it cannot be."""

    def __init__(self, place: str | int | None) -> None:
        self._place = place
        self._supervisor = os.environ.pop("NOTIFY_SOCKET", "")
        try:
            self._remove()
        except OSError as error:
            raise UsageError(f"--ready {place}: {error.strerror}; wanted the name of a file to make") from None

    def key(self, line: str) -> None:
        """Says what must be endorsed before it can serve: by the descriptor, else on standard output."""
        if isinstance(self._place, int):
            os.write(self._place, f"{line}\n".encode())
        else:
            print(line, flush=True)

    def loads(self, line: str) -> None:
        """Says how far it is, by the descriptor, to whoever reads that at once: nobody has to."""
        if isinstance(self._place, int):
            room = select.poll()
            room.register(self._place, select.POLLOUT)
            with suppress(OSError):
                if room.poll(0):
                    os.write(self._place, f"{line}\n".encode())

    def serves(self, line: str) -> None:
        """Raises UsageError if the file cannot be written, OSError if nobody holds the descriptor's other end."""
        match self._place:
            case None:
                print(line, flush=True)
            case int():
                with open(self._place, "w") as ready:
                    print(line, file=ready)
            case str():
                try:
                    write_file(self._place, line + "\n")
                except OSError as error:
                    raise UsageError(f"--ready {self._place}: {error.strerror}") from None
        self._notify(f"READY=1\nSTATUS={line}")

    def ends(self) -> None:
        """It takes nothing new from now on."""
        self._notify("STOPPING=1")
        try:
            self._remove()
        except OSError as error:
            log.warning("--ready %s says still that this stage serves: %s", self._place, error.strerror)

    def _remove(self) -> None:
        if isinstance(self._place, str):
            with suppress(FileNotFoundError):
                os.unlink(self._place)

    def _notify(self, state: str) -> None:
        if not self._supervisor:
            return
        address = "\0" + self._supervisor[1:] if self._supervisor.startswith("@") else self._supervisor
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(PATIENCE)
                sock.sendto(state.encode(), address)
        except (OSError, ValueError) as error:  # the stage serves all the same
            log.warning(
                "NOTIFY_SOCKET %r was not told %s: %s", self._supervisor, state.split("\n", maxsplit=1)[0], error
            )
