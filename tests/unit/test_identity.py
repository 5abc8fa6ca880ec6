"""Whose share a peer's requests are part of."""

from types import SimpleNamespace
from typing import Any

import pytest

from minigpt.stage.places import Identity
from minigpt.stage.stage import Stage

KEY, OTHER = b"k" * 32, b"o" * 32
SOURCE = "tcp://192.0.2.1"
BY_KEY, BY_ADDRESS, OWN_STAGE = Identity(KEY.hex(), known=True), Identity(SOURCE), Identity(SOURCE, known=True)


@pytest.mark.parametrize(
    ("clients", "operators", "index", "wanted"),
    [
        (None, None, 0, BY_ADDRESS),  # anyone is admitted, and is told everything
        (None, frozenset(), 0, BY_ADDRESS),
        (None, frozenset([OTHER]), 0, BY_ADDRESS),
        (None, frozenset([KEY]), 0, BY_KEY),
        (frozenset([KEY, OTHER]), frozenset([OTHER]), 0, BY_KEY),
        (frozenset([KEY]), None, 0, BY_KEY),
        (frozenset([KEY]), None, 1, OWN_STAGE),
    ],
)
def test_an_identity_is_a_listed_key_or_else_an_address(
    clients: frozenset[bytes] | None, operators: frozenset[bytes] | None, index: int, wanted: Identity
) -> None:
    stage = Stage.__new__(Stage)
    manifest: Any = SimpleNamespace(clients=clients, operators=operators)
    stage.manifest, stage.index = manifest, index
    channel: Any = SimpleNamespace(peer_static_key=KEY)
    assert stage.identity(channel, SOURCE) == wanted
