"""A platform's endorsements for a stage: from a folder, or from a process at an address, outside its guest or enclave.

Whoever connects there is sent all files at once (a delivery, in `attest.certificates`), and then the connection ends:
so a stage gets its manifest, too. Nothing is secret and nobody is trusted, because peers verify what a stage passes on.
The host, which delivers them, sees them, and can withhold them or send old ones.
"""

import logging
import time
from collections.abc import Mapping
from functools import partial

from attest import AttestationError, certificates
from attest.certificates import Files
from attest.providers import tdx_collateral
from attest.x509 import Certificate, Crl
from transport.address import Address
from transport.errors import TransportError
from transport.sockets import Listener, Wire, connect, receive_all

log = logging.getLogger("minigpt.stage")

WAIT = 5.0  # seconds to connect, and as many until all has been sent
AGAIN = 10.0  # seconds between two times that a stage asks


def source(place: str | None) -> Files | None:
    """What gives the files of --endorsements: those of a folder each time, or of an address. Raises AddressError."""
    if place is None:
        return None
    return Delivered(Address.parse(place)) if "://" in place else partial(certificates.files, place)


class Delivered:
    """Files from an address. If none come, those that came last still count; at first there are none.

    One thread calls it at a time.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._again = 0.0  # when to ask, in terms of `time.monotonic`
        self._files: Mapping[str, bytes] = {}

    def __call__(self) -> Mapping[str, bytes]:
        """The files, at most AGAIN seconds old if they are to be had. Takes 2 * WAIT seconds at most."""
        if time.monotonic() >= self._again:
            try:
                self._ask()
            except (AttestationError, TransportError) as error:
                kept = f"the {len(self._files)} files from before still count" if self._files else "there are none yet"
                log.warning("no endorsements came from %s: %s; %s", self._address, error, kept)
            self._again = time.monotonic() + AGAIN
        return self._files

    def _ask(self) -> None:
        data = receive_all(connect(self._address, WAIT), certificates.MAX_DELIVERY, WAIT)
        found = certificates.delivered(data)
        files = {f"file {number} from {self._address}": item for number, item in enumerate(found, start=1)}
        if files != self._files:
            log.info("%d files of endorsements came from %s", len(files), self._address)
        self._files = files


def checked(folder: str) -> bytes:
    """The delivery of a folder's files. Raises AttestationError, also if one is anything but endorsements: whoever
    connects gets them, and a key may lie among them by mistake."""
    files = certificates.files(folder)
    if not files:
        raise AttestationError(f"{folder}: it is empty, wanted a folder with certificates and revocation lists in it")
    for place, data in files.items():
        if tdx_collateral.in_answer(place, data) is not None:
            continue
        for item in certificates.in_file(place, data):
            try:
                (Crl if certificates.is_list(item) else Certificate).read(item)
            except AttestationError as error:
                raise AttestationError(f"{place}: {error}: wanted certificates and revocation lists") from None
    return certificates.delivery(list(files.values()))


def serve(listener: Listener, folder: str) -> None:
    """Sends a folder's files to whoever connects, to one after the other, until the listener is closed."""
    while (accepted := listener.accept()) is not None:
        sock, peer = accepted
        wire = Wire(sock)
        try:
            data = checked(folder)
            wire.write(data, time.monotonic() + WAIT)
            log.info("%s: sent %d files", peer, data[0])
        except (AttestationError, TransportError) as error:
            log.warning("%s: sent none: %s", peer, error)
        finally:
            wire.close()
