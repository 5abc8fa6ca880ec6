"""Which handshake is ended for a newcomer, when there are too many."""

from types import SimpleNamespace
from typing import Any, cast

from minigpt.stage.places import Identity
from minigpt.stage.server import Server


class Handshakes:
    """A server with these, as many as there may be. Each is (source, how far it has come)."""

    def __init__(self, *under_way: tuple[str, str]) -> None:
        self.server = Server.__new__(Server)
        self.server.stage = cast("Any", SimpleNamespace(limits=SimpleNamespace(handshakes=len(under_way))))
        self.server.open = {}
        for number, (source, progress) in enumerate(under_way):
            asked = progress in ("waits", "given", "listed")
            ticket = SimpleNamespace(asked=asked, first=progress in ("listed", "listed, message 1"))
            self.server.open[number] = cast("Any", SimpleNamespace(
                number=number, source=source, who=Identity(source) if progress == "channel" else None,
                ticket=None if progress == "new" else ticket, waits=progress == "waits",
            ))  # fmt: skip

    def expendable(self) -> list[int]:
        """The numbers of those of which one has to go."""
        return [one.number for one in self.server._expendable()]


def test_nobody_has_to_go_while_there_is_room() -> None:
    handshakes = Handshakes(("a", "new"), ("a", "channel"))
    assert handshakes.expendable() == []


def test_whoever_has_sent_message_3_makes_no_room_for_those_who_have_not() -> None:
    assert Handshakes(("a", "given"), ("a", "waits"), ("b", "message 1"), ("c", "new")).expendable() == [2, 3]
    assert Handshakes(("a", "waits"), ("a", "given"), ("a", "given"), ("b", "new")).expendable() != [3]


def test_those_who_have_sent_message_3_keep_half_of_them_from_nobody() -> None:
    """Message 3 costs a stranger next to nothing."""
    assert Handshakes(("a", "given"), ("b", "given"), ("c", "given"), ("d", "new")).expendable() == [0, 1, 2]
    assert Handshakes(("a", "given"), ("b", "waits")).expendable() == [0]
    assert Handshakes(("a", "given"), ("b", "given")).expendable() == [0, 1]


def test_one_of_the_source_with_the_most_goes_and_any_of_them() -> None:
    assert Handshakes(("a", "new"), ("b", "new"), ("a", "message 1")).expendable() == [0, 2]
    assert Handshakes(("a", "given"), ("b", "given"), ("c", "new"), ("a", "given")).expendable() == [0, 3]


def test_listed_clients_and_our_own_stages_go_last_once_they_have_sent_message_3() -> None:
    assert Handshakes(("a", "listed"), ("a", "listed"), ("b", "given"), ("c", "new")).expendable() == [2]
    assert Handshakes(("a", "listed, message 1"), ("b", "message 1")).expendable() == [0, 1]


def test_whoever_waits_for_our_evidence_goes_after_those_who_have_it() -> None:
    assert Handshakes(("a", "waits"), ("a", "given"), ("a", "waits"), ("b", "new")).expendable() == [1]
    assert Handshakes(("a", "waits"), ("a", "waits"), ("b", "given"), ("c", "new")).expendable() == [0, 1]
