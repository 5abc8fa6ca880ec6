"""Endorsements from an address: bounded, kept if no others come, and nothing else than them is handed out."""

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import guests
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from attest import AttestationError, EvidenceError, certificates
from minigpt.stage import endorsements
from minigpt.stage.endorsements import Delivered
from transport.address import Address
from transport.errors import Unreachable

SEVERAL = [b"one", b"", b"three" * 1000]
ADDRESS = Address.parse("vsock://3:5005")
Answer = bytes | Exception


def test_a_delivery_gives_back_the_files() -> None:
    most = [bytes([number]) * certificates.MAX_FILE for number in range(16)]
    for files in (SEVERAL, most, [b""]):
        data = certificates.delivery(files)
        assert certificates.delivered(data) == files
    assert len(certificates.delivery(most)) == certificates.MAX_DELIVERY
    assert certificates.delivery([b"ab", b"c"]) == bytes.fromhex("02 00000002 6162 00000001 63")


def test_more_files_or_longer_ones_are_not_delivered() -> None:
    for files in ([], [b""] * 17, [b""] * 300, [bytes(certificates.MAX_FILE + 1)]):
        with pytest.raises(EvidenceError, match=r"^delivery: got .*, wanted "):
            certificates.delivery(files)


def test_every_cut_and_every_addition_is_noticed() -> None:
    data = certificates.delivery([b"one", b"", b"two"])
    for damaged in (*(data[:length] for length in range(len(data))), data + b"\0", b"\x11" + data[1:]):
        with pytest.raises(EvidenceError, match=r"^delivery: got "):
            certificates.delivered(damaged)


class Host:
    """What answers at an address, in place of `connect`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: Answer | Callable[[socket.socket], None] = certificates.delivery(SEVERAL)
        self.asked, self.ends = 0, list[socket.socket]()
        monkeypatch.setattr(endorsements, "connect", self.connect)

    def connect(self, address: Address, timeout: float) -> socket.socket:
        assert (address, timeout) == (ADDRESS, endorsements.WAIT)
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        near, far = socket.socketpair()
        self.ends.append(far)
        if callable(self.answer):
            self.answer(far)
        else:
            far.sendall(self.answer)
            far.close()
        return near


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(endorsements, "AGAIN", 0.0)
    host = Host(monkeypatch)
    yield host
    for end in host.ends:
        end.close()


def test_a_stage_asks_again_after_a_while_and_not_before(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endorsements, "AGAIN", 3600.0)
    files = Delivered(ADDRESS)
    assert list(files().values()) == SEVERAL
    host.answer = certificates.delivery([b"new"])
    assert list(files().values()) == SEVERAL
    assert host.asked == 1
    monkeypatch.setattr(endorsements, "AGAIN", 0.0)
    assert list(Delivered(ADDRESS)().values()) == [b"new"]


def test_new_files_count_from_then_on(host: Host) -> None:
    files = Delivered(ADDRESS)
    assert list(files().values()) == SEVERAL
    host.answer = certificates.delivery([b"new"])
    assert files() == {"file 1 from vsock://3:5005": b"new"}


BAD: dict[str, Answer | Callable[[socket.socket], None]] = {
    "not there": Unreachable("refused"),
    "nothing": b"",
    "noise": b"\xff" * 100,
    "half": certificates.delivery(SEVERAL)[:-1],
    "silence": lambda far: None,
    "no end": lambda far: far.sendall(certificates.delivery(SEVERAL)),
}


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
def test_what_is_no_delivery_changes_nothing_and_is_told(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: bytes
) -> None:
    files = Delivered(ADDRESS)
    host.answer, good = answer, host.answer
    monkeypatch.setattr(endorsements, "WAIT", 0.2)
    assert files() == {}
    assert "no endorsements came from vsock://3:5005: " in caplog.text
    assert "there are none yet" in caplog.text
    host.answer = good
    monkeypatch.setattr(endorsements, "WAIT", 60.0)
    assert list(files().values()) == SEVERAL
    host.answer = answer
    monkeypatch.setattr(endorsements, "WAIT", 0.2)
    assert list(files().values()) == SEVERAL
    assert "the 3 files from before still count" in caplog.text


def test_a_sender_of_too_much_is_cut_off(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(certificates, "MAX_DELIVERY", 1000)
    assert Delivered(ADDRESS)() == {}
    assert "more than 1000 bytes" in caplog.text


def test_the_log_is_silent_about_files_that_stay_the_same(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    files = Delivered(ADDRESS)
    for _ in range(3):
        files()
    assert [record.getMessage() for record in caplog.records] == ["3 files of endorsements came from vsock://3:5005"]


def test_only_endorsements_are_handed_out(tmp_path: Path) -> None:
    for name, data in zip(("vcek", "ask", "ark"), guests.living(), strict=True):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "crl").write_bytes(guests.revocations())
    assert sorted(certificates.delivered(endorsements.checked(str(tmp_path)))) == sorted(
        [*guests.living(), guests.revocations()]
    )
    key = guests.VEK.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    der = guests.VEK.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    for wrong in (key, der, b"a note", b"{}", guests.living()[0][:-1]):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(AttestationError, match=r"/wrong: "):
            endorsements.checked(str(tmp_path))
