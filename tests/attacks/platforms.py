"""Attacks 21, 23, 25 and 78: on the evidence of platforms, which here is Nitro's under the tests' own root.

What is shown is made for the right handshake, by the right key, with the right claims: only what the attack is about
is wrong. The genuine documents of debug enclaves are refused in tests/unit/test_attest_nitro.py.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import enclaves
from cryptography.hazmat.primitives.asymmetric import ec
from enclaves import Holder

from attacks import Seen, attack, require
from attacks.arena import INSTANCE, Arena, together
from attacks.ends import as_client
from attacks.evidence import REFUSED, honest_body, show_client, show_stage
from attacks.host import refused_before
from attest.providers.nitro import NitroAttester

PCRS = enclaves.PCRS | {2: bytes([100]) * 48, 4: bytes([INSTANCE]) * 48}  # what the manifest pins of stage 0


def genuine(arena: Arena, holders: list[Holder] | None = None, age: float = 0.0, **changes: Any) -> NitroAttester:
    """What the pinned enclave of stage 0 says of itself; with changes."""
    now = datetime.now(UTC)
    stamp = int((now - timedelta(seconds=age)).timestamp() * 1000)
    device = enclaves.Device(holders or enclaves.living(now), **{"pcrs": PCRS, "timestamp": stamp} | changes)
    return NitroAttester(arena.stages.manifest.claims(0), device="/dev/null", ioctl=device)


def show_both(arena: Arena, *attesters: NitroAttester) -> list[Seen]:
    return [
        seen
        for attester in attesters
        for seen in (show_client(arena, honest_body, attester), show_stage(arena, honest_body, attester))
    ]


def with_controls(arena: Arena, seen: list[Seen]) -> Seen:
    """The same fake stage without the fault is accepted at both places; and an honest client is served."""
    show_client(arena, honest_body, genuine(arena), accepted=True)
    show_stage(arena, honest_body, genuine(arena), accepted=True)
    arena.control()
    return together(seen)


@attack(21, "an enclave in debug mode; with its code registers as pinned but for one", REFUSED)
def debug(arena: Arena) -> Seen:
    with arena.enclaves():
        zero = dict.fromkeys(range(3), bytes(48))
        seen = show_both(arena, genuine(arena, pcrs=PCRS | zero))
        for index in arena.some(range(3), 1):
            seen += show_both(arena, genuine(arena, pcrs=PCRS | {index: bytes(48)}))
        return with_controls(arena, seen)


@attack(23, "another root with the vendor's names; a leaf that signs a leaf; a root that no switch allows", REFUSED)
def roots(arena: Arena) -> Seen:
    with arena.enclaves() as pipes:
        now, foreign = datetime.now(UTC), ec.derive_private_key(7, ec.SECP384R1())
        holders, names = enclaves.living(now), {"root": {"key": foreign}}
        leaf, hour = holders[-1], timedelta(hours=1)
        extensions = enclaves.extension(enclaves.CONSTRAINTS, enclaves.tlv(0x30)), enclaves.usage(enclaves.SIGNS)
        name = enclaves.name("i-0.us-east-1.aws")
        below = enclaves.certificate(name, foreign, leaf.key, leaf.name, now - hour, now + hour, extensions)
        seen = show_both(
            arena,
            genuine(arena, enclaves.living(now, names)),
            genuine(arena, [*holders, Holder(name, foreign, below)]),
            genuine(arena, [*enclaves.living(now, names)[:1], *holders[1:]]),  # the names fit, the signature does not
        )
        seen.append(refused_before(arena, allow_test_root=False))
        document = json.loads(pipes.bytes)
        del document["stages"][0]["evidence"]["test_root"]  # stage 0 is to be AWS's then, and stage 1 the tests'
        path = arena.where / "vendors.json"
        path.write_text(json.dumps(document))
        answer = arena.run(manifest=str(path))
        require(answer["error"] and not answer["tokens"], f"wanted a refusal, got {answer}")
        seen.append(Seen(f"{answer['error'][0]} (exit {answer['error'][2]})", "served nobody"))
        return with_controls(arena, seen)


@attack(25, "diversion to a genuine twin: the same image on another instance, or with another key", REFUSED)
def twin(arena: Arena) -> Seen:
    with arena.enclaves():
        seen = show_both(
            arena,
            genuine(arena, pcrs=PCRS | {4: bytes([INSTANCE + 1]) * 48}),
            genuine(arena, pcrs={index: value for index, value in PCRS.items() if index != 4}),
        )
        return with_controls(arena, seen)


@attack(78, "Nitro: stale, of the future, expired, unsigned; a device that is asked again and again", REFUSED)
def nitro(arena: Arena) -> Seen:
    with arena.enclaves() as pipes:
        now = datetime.now(UTC)
        ended = {"leaf": {"begins": now - timedelta(hours=4), "ends": now - timedelta(hours=1)}}
        coming = {"leaf": {"begins": now + timedelta(hours=1), "ends": now + timedelta(hours=4)}}
        late = [genuine(arena, age=age) for age in arena.some((301.0, -301.0, 3600.0), 2)]
        lives = [genuine(arena, enclaves.living(now, changes)) for changes in (ended, coming)]
        seen = show_both(arena, *late, *lives)
        holders = enclaves.living(now)
        other = Holder(holders[-1].name, ec.derive_private_key(9, ec.SECP384R1()), holders[-1].der)
        seen += show_both(arena, genuine(arena, [*holders[:-1], other]))  # signed by another key than its leaf's
        before, count = pipes.answers(0), 6
        for _ in range(count):  # strangers who want evidence, and give none
            with as_client(pipes) as rogue:
                require(rogue.shake().hear_attest(), "stage 0 gave a stranger no evidence")
        until = time.monotonic() + 20
        while pipes.answers(0) < before + count and time.monotonic() < until:
            time.sleep(0.05)
        require(pipes.answers(0) == before + count, "a handshake asked the device more than once, or not at all")
        return with_controls(arena, seen)
