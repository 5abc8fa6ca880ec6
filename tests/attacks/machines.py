"""Attacks 24 and 79 to 84: on the evidence of SNP and TDX, whose stages are virtual machines, under the tests' roots.

As in `platforms`, what is shown is made for the right handshake, by the right key, with the right claims: only what
the attack is about is wrong, and it must be refused for that reason.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import domains
import enclaves
import guests
from cryptography.hazmat.primitives.asymmetric import ec
from ends import background

from attacks import Seen, attack, require
from attacks.arena import FLAGS, PATIENCE, TOKENS, Arena, Pipes, eventually, together
from attacks.ends import HOUR, FakeStage, as_client, as_stage_before
from attacks.evidence import REFUSED, honest_body, says, show_client, show_stage
from attacks.host import changed, refused_before
from attacks.platforms import genuine as enclave
from attacks.rogue import ATTEST, FIN, ROOM, Rogue
from attest import Attester, Binding, Evidence, Provider
from attest.ecdsa import _ORDER as ORDER
from attest.providers.mock import MockAttester, MockKey
from transport.noise import KeyPair

MEASURED = bytes([100]) * 48  # what the pinned guest of stage 0 measures to
YEARS = timedelta(days=3650)
PAST: dict[str, Any] = {"begins": datetime(2020, 1, 1, tzinfo=UTC), "ends": datetime(2021, 1, 1, tzinfo=UTC)}
DATED = {text: domains.date(moment) for text, moment in (("issueDate", PAST["begins"]), ("nextUpdate", PAST["ends"]))}
FOREIGN = ec.derive_private_key(7, ec.SECP256R1())


@dataclass(frozen=True)
class Guest:
    """What a machine says of itself: `make` gives evidence and endorsements for the binding's digest."""

    provider: Provider
    claims: bytes
    make: Callable[[bytes], tuple[bytes, Sequence[bytes]]]

    def attest(self, binding: Binding) -> Evidence:
        data, endorsements = self.make(binding.digest)
        return Evidence(self.provider, self.claims, data, tuple(endorsements))


Case = tuple[str, Mapping[str, Any]]  # what the refusal says, and what is wrong: arguments of `snp` or `tdx`
NEWEST = guests.revocations(number=5, **guests.EVER)


def snp(
    arena: Arena,
    chain: Callable[[], list[bytes]] = guests.living,
    listed: Sequence[bytes] = (NEWEST,),
    cut: Callable[[bytes], bytes] = bytes,
    **fields: Any,
) -> Guest:
    """The pinned guest of stage 0; with another chain, other revocation lists, fields, or a report cut somehow."""

    def make(digest: bytes) -> tuple[bytes, list[bytes]]:
        report = guests.report(**({"report_data": digest, "measurement": MEASURED} | fields))
        return cut(report), [*chain(), *listed]

    return Guest(Provider.SNP, arena.stages.manifest.claims(0), make)


def tdx(
    arena: Arena,
    made: Callable[[], dict[str, enclaves.Holder]] = domains.living,
    parts: Callable[..., Sequence[bytes]] = domains.living_collateral,
    cut: Callable[[bytes], bytes] = bytes,
    collateral: Mapping[str, Any] = {},
    **fields: Any,
) -> Guest:
    """The same of TDX; with other certificates, collateral, or parts of it, fields, or a quote cut somehow."""

    def make(digest: bytes) -> tuple[bytes, Sequence[bytes]]:
        holders = made()
        quote = domains.quote(holders, **({"report_data": digest, "mrtd": MEASURED} | fields))
        return cut(quote), parts(holders, **collateral)

    return Guest(Provider.TDX, arena.stages.manifest.claims(0), make)


MAKERS: dict[str, Callable[..., Guest]] = {"snp": snp, "tdx": tdx}


def show_all(arena: Arena, kind: str, cases: Mapping[str, Case], most: int) -> list[Seen]:
    """Each case at both places, and then without a fault at both; an honest client is served meanwhile."""
    seen = []
    with arena.guests(kind, kind):
        for name in arena.some(list(cases), most):
            reason, wrong = cases[name]
            guest = MAKERS[kind](arena, **wrong)
            for show in (show_client, show_stage):
                with told(name):
                    seen.append(show(arena, honest_body, guest, reason=f"{reason}: "))
        for show in (show_client, show_stage):
            show(arena, honest_body, MAKERS[kind](arena), accepted=True)
        arena.control()
    return seen


@contextmanager
def told(name: str) -> Iterator[None]:
    """Says which case it was that survived."""
    try:
        yield
    except Exception as error:
        error.args = (f"{name}: {error}",)
        raise


def tcb(**changes: int) -> bytes:
    return guests.tcb(guests.VERSIONS | changes)


def vek(**changes: Any) -> Callable[[], list[bytes]]:
    """The chain with another VEK: arguments of `vek_extensions`."""
    return lambda: guests.living(vek={"extensions": guests.vek_extensions(**changes)})


def snp_fields() -> dict[str, Case]:
    lower, other = tcb(snp=23), bytes([9]) * 64
    return {
        "a higher TCB than its VEK's": ("tcb", {"reported_tcb": tcb(snp=25)}),
        "a lower TCB, with its VEK": (
            "min_tcb",
            {"reported_tcb": lower, "chain": vek(versions=guests.VERSIONS | {"snp": 23})},
        ),
        "a lower committed TCB": ("min_tcb", {"committed_tcb": lower}),
        "a lower launch TCB": ("min_tcb", {"launch_tcb": lower}),
        "another chip's VEK": ("chip-id", {"chip_id": other}),
        "a masked chip": ("chip-id", {"chip_id": bytes(64)}),
        "a chip that is not pinned": ("chip_ids", {"chip_id": other, "chain": vek(chip=other)}),
        "another VMPL": ("vmpl", {"vmpl": 1}),
        "a policy for migration": ("migratable", {"policy": 0x70000}),
        "a migration agent": ("migratable", {"report_id_ma": b"\x08" * 32}),
    }


def bound_to(key: ec.EllipticCurvePrivateKey, auth: bytes = bytes(range(32))) -> bytes:
    """The report data of a quoting enclave that reports this key."""
    return hashlib.sha256(domains.point(key) + auth).digest() + bytes(32)


def tdx_fields() -> dict[str, Case]:
    reported = bound_to(domains.KEYS["quote"])
    newer = [domains.firmware(pcesvn=domains.PCESVN + 1)]
    old = domains.platform(components=(2,) + domains.COMPONENTS[1:])
    return {
        "a key that the QE did not report": ("qe-binding", {"key": FOREIGN, "reported": reported}),
        "other data than the QE reported": ("qe-binding", {"auth": b"other", "reported": reported}),
        "more than the QE's digest": ("qe-binding", {"reported": reported[:-1] + b"\1"}),
        "old TCB info": ("collateral-expired", {"collateral": {"info": DATED}}),
        "an old QE identity": ("collateral-expired", {"collateral": {"identity": DATED}}),
        "another FMSPC": ("fmspc", {"collateral": {"info": {"fmspc": "00" * 6}}}),
        "another PCEID": ("fmspc", {"collateral": {"info": {"pceId": "0100"}}}),
        "firmware below all levels": ("tcb", {"collateral": {"info": {"tcbLevels": newer}}}),
        "a PCK certificate below all levels": (
            "tcb",
            {"made": lambda: domains.living(pck={"extensions": (*LEAF, old)})},
        ),
        "a domain that may migrate": ("migratable", {"td_attributes": bytes.fromhex("0000003000000000")}),
    }


LEAF = enclaves.extension("551d13", enclaves.tlv(0x30)), enclaves.usage(enclaves.SIGNS)


@attack(24, "SNP: TCB, chip, VMPL, migration; TDX: QE binding, collateral's age, FMSPC, no TCB level", REFUSED)
def fields(arena: Arena) -> Seen:
    seen = show_all(arena, "snp", snp_fields(), 10)
    return together(seen + show_all(arena, "tdx", tdx_fields(), 10))


def numbers(at: int, size: int, order: int, byteorder: Any) -> dict[str, tuple[int, bytes]]:
    """Places and values of r and s that no signature has; s is 2 * `at` further on."""
    return {
        f"{name} {what}": (where, number.to_bytes(size, byteorder))
        for name, where in (("r", at), ("s", at + (72 if size == 48 else 32)))
        for what, number in (("of zero", 0), ("of the order", order), ("of all ones", 256**size - 1))
    }


def with_bytes(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + value + data[at + len(value) :]


def snp_traps() -> dict[str, Case]:
    r = 0x2A0
    made = {name: ("signature", {"cut": with_bytes(*edit)})
            for name, edit in numbers(r, 48, ORDER["NIST P-384"], "little").items()}  # fmt: skip
    leaf = guests.vek_extensions()
    return made | {
        "a second encoding of r": ("SNP report", {"cut": with_bytes(r + 48, b"\1")}),
        "a second encoding of s": ("SNP report", {"cut": with_bytes(r + 72 + 48, b"\1")}),
        "a byte less": ("SNP report", {"cut": lambda data: data[:-1]}),
        "a byte more": ("SNP report", {"cut": lambda data: data + b"\0"}),
        "nothing": ("SNP report", {"cut": lambda _: b""}),
        "another algorithm": ("alg", {"algorithm": 2}),
        "no measurement": ("measurements", {"measurement": bytes(48)}),
        "another measurement": ("measurements", {"measurement": MEASURED[:-1] + b"\0"}),
        "debug": ("debug", {"policy": 0xB0000}),
        "a policy without SMT": ("policy", {"policy": 0x20000}),
        "another session's report": ("binding", {"report_data": bytes(64)}),
        "a key of the host's": ("signature", {"key": ec.derive_private_key(7, ec.SECP384R1())}),
        "AMD's names, another root": ("chain", {"chain": lambda: guests.living(guests.rsa_key(2)), "listed": ()}),
        "a root that did not sign": ("chain", {"chain": lambda: [*guests.living(guests.rsa_key(2))[:2],
                                                                 guests.living()[2]]}),
        "an ASK that is a leaf": ("chain", {"chain": lambda: guests.living(ask={"extensions": LEAF})}),
        "a VEK that is an authority": ("chain", {"chain": lambda: guests.living(
            vek={"extensions": (*leaf, enclaves.authority(0), enclaves.usage("03020204"))})}),
        "a critical extension": ("chain", {"chain": lambda: guests.living(
            vek={"extensions": (*leaf, enclaves.extension("551d25", b"\5\0"))})}),
        "a name before VCEK": ("chain", {"chain": lambda: guests.living(vek={"common": "X-SEV-VCEK"})}),
        "a name behind VCEK": ("chain", {"chain": lambda: guests.living(vek={"common": "SEV-VCEK-1"})}),
        "VLEK's ASK": ("chain", {"chain": lambda: guests.living(
            ask={"common": "SEV-VLEK-Milan"}, vek={"issuer": "SEV-VLEK-Milan"})}),
        "another product's chain": ("chain", {"chain": vek(product="Genoa-B0")}),
        "another product's processor": ("product", {"processor": guests.MODELS["Genoa"]}),
        "a VEK that has ended": ("expired", {"chain": lambda: guests.living(vek=PAST)}),
        "a VEK still to begin": ("not-yet-valid", {"chain": lambda: guests.living(
            vek={"begins": datetime.now(UTC) + YEARS, "ends": datetime.now(UTC) + 2 * YEARS})}),
        "a cloud's key, on any chip": ("chip_ids", {"key_info": 4, "chain": lambda: guests.living(vlek=True)}),
        "a VLEK called VCEK": ("chain", {"chain": lambda: guests.living(vlek=True)}),
        "no endorsements": ("SNP endorsements", {"chain": list, "listed": ()}),
        "the VEK alone": ("SNP endorsements", {"chain": lambda: guests.living()[:1], "listed": ()}),
    }  # fmt: skip


@attack(79, "SNP: every trap of the verifier's", REFUSED)
def snp_surface(arena: Arena) -> Seen:
    return together(show_all(arena, "snp", snp_traps(), 9))


def tdx_traps() -> dict[str, Case]:
    made = {name: ("signature", {"cut": with_bytes(*edit)})
            for name, edit in numbers(636, 32, ORDER["NIST P-256"], "big").items()}  # fmt: skip
    pck, stranger = domains.living()["pck"], enclaves.Holder(b"", FOREIGN, b"")
    with_own_key = domains.living() | {"pck": enclaves.Holder(pck.name, FOREIGN, pck.der)}
    old = [domains.firmware("OutOfDate")]
    needy = [domains.module("01", domains.level("OutOfDate", isvsvn=2))]
    return made | {
        "a byte less": ("TDX quote", {"cut": lambda data: data[:-1]}),
        "nothing": ("TDX quote", {"cut": lambda _: b""}),
        "a length of all ones": ("TDX quote", {"cut": with_bytes(632, b"\xff" * 4)}),
        "another kind of key": ("alg", {"cut": with_bytes(2, b"\3")}),
        "another TEE": ("TDX quote", {"cut": with_bytes(4, b"\0")}),
        "no MRTD": ("mrtd", {"mrtd": bytes(48)}),
        "another kernel": ("rtmr1", {"rtmr1": bytes(48)}),
        "debug": ("debug", {"td_attributes": bytes.fromhex("0100001000000000")}),
        "another session's quote": ("binding", {"report_data": bytes(64)}),
        "a key of the host's": ("qe-binding", {"key": FOREIGN, "reported": bound_to(domains.KEYS["quote"])}),
        "a QE of the host's": ("signature", {"made": lambda: with_own_key}),
        "Intel's names, another root": ("chain", {"made": lambda: domains.living(FOREIGN)}),
        "an authority that is a leaf": ("chain", {"made": lambda: domains.living(authority={"extensions": LEAF})}),
        "a leaf that is an authority": ("chain", {"made": lambda: domains.living(
            pck={"extensions": (enclaves.authority(0), enclaves.usage(enclaves.SIGNS), domains.platform())})}),
        "a name behind the CA's": ("chain", {"made": lambda: domains.living(
            authority={"subject": domains.name("Intel SGX PCK Platform CA 2")})}),
        "a name before the leaf's": ("chain", {"made": lambda: domains.living(
            pck={"subject": domains.name("An Intel SGX PCK Certificate")})}),
        "a leaf signed by another": ("chain", {"made": lambda: domains.living(pck={"signer": stranger.key})}),
        "a PCK certificate that has ended": ("expired", {"made": lambda: domains.living(pck=PAST)}),
        "no certificates": ("chain", {"text": b""}),
        "a module of nobody's": ("module", {"mrsignerseam": b"\1" * 48}),
        "a module for tests": ("module", {"seam_attributes": b"\1" + bytes(7)}),
        "an unknown module": ("tcb", {"tee_tcb_svn": bytes.fromhex("0609") + domains.TEE_TCB_SVN[2:]}),
        "a good module on an old platform": ("statuses", {"collateral": {"info": {"tcbLevels": old}}}),
        "an old module on a good platform": ("statuses", {"collateral": {"info": {"tdxModuleIdentities": needy}}}),
        "an old QE": ("statuses", {"collateral": {"identity": {"tcbLevels": [domains.level("OutOfDate", isvsvn=4)]}}}),
        "another enclave than the QE": ("qe-identity", {"qe": {"mrsigner": bytes(32)}}),
        "a QE in debug mode": ("qe-identity", {"qe": {"attributes": bytes([0x13]) + bytes(15)}}),
        "a QE below all levels": ("tcb", {"qe": {"isvsvn": 3}}),
        "no collateral": ("collateral-required", {"parts": lambda *_: ()}),
    }  # fmt: skip


@attack(80, "TDX: every trap of the verifier's", REFUSED)
def tdx_surface(arena: Arena) -> Seen:
    return together(show_all(arena, "tdx", tdx_traps(), 9))


def names(count: int) -> bytes:
    one = enclaves.tlv(0x31, enclaves.tlv(0x30, enclaves.tlv(6, bytes.fromhex("550403")), enclaves.tlv(12, b"a")))
    return enclaves.tlv(0x30, one * count)


def long_list(algorithm: bytes, size: int, *, named: bool) -> bytes:
    """A revocation list of as many names or entries as there is room for, that nobody signed."""
    name = guests.name("ARK-Milan") if algorithm == guests.PSS else domains.name(domains.NAMES["root"])
    dates = enclaves.time(guests.EVER["begins"]) + enclaves.time(guests.EVER["ends"])
    entry = enclaves.tlv(0x30, enclaves.integer(7), enclaves.time(PAST["begins"]))
    room = size - 800
    name, entries = (names(room // 12), b"") if named else (name, enclaves.tlv(0x30, entry * (room // len(entry))))
    signed = b"\1" * 512 if algorithm == guests.PSS else enclaves.tlv(0x30, enclaves.integer(1), enclaves.integer(1))
    tbs = enclaves.tlv(0x30, enclaves.integer(1), algorithm, name, dates, entries)
    made = enclaves.tlv(0x30, tbs, algorithm, enclaves.tlv(3, b"\0", signed))
    require(size - 1200 < len(made) <= size, f"the kit made a list of {len(made)} bytes, wanted about {size}")
    return made


def long_chain(size: int) -> bytes:
    """PEM of as many certificates as there is room for, each a few bytes."""
    return domains.pem(*[b"\x30\0"] * (size // len(domains.pem(b"\x30\0"))))


def bulks(kind: str) -> dict[str, Callable[[bytes], tuple[bytes, Sequence[bytes]]]]:
    """Evidence and endorsements that are large, by what is large."""
    most = 64 * 1024
    room = 256 * 1024 - 8192  # of all endorsements, beside what is genuine
    own = enclaves.living(datetime.now(UTC))[-1]

    def named(size: int) -> bytes:  # a certificate
        return enclaves.certificate(
            names((size - 500) // 12), own.key, own.key, own.name, guests.EVER["begins"], guests.EVER["ends"], ()
        )

    deep = b'{"a":' * (most // 5)

    def snp_with(*items: bytes) -> Callable[[bytes], tuple[bytes, Sequence[bytes]]]:
        return lambda digest: (guests.report(report_data=digest, measurement=MEASURED), items)

    def tdx_with(text: bytes | None = None, /, **parts: Any) -> Callable[[bytes], tuple[bytes, Sequence[bytes]]]:
        fields: dict[str, Any] = {} if text is None else {"text": text}
        return lambda digest: (
            domains.quote(domains.living(), report_data=digest, mrtd=MEASURED, **fields),
            domains.living_collateral(**parts),
        )

    small = room // 16
    if kind == "snp":
        vek, ask, ark = guests.living()
        return {
            "16 that just fit": snp_with(*[bytes(small)] * 16),
            "three of 64 KiB": snp_with(*[named(most - 100)] * 3),
            "4 KiB of names": snp_with(named(4000), ask, ark),
            "a list of names": snp_with(vek, ask, ark, long_list(guests.PSS, most, named=True)),
            "a list of entries": snp_with(vek, ask, ark, long_list(guests.PSS, most, named=False)),
            "four lists": snp_with(*[long_list(guests.PSS, most - 2048, named=False)] * 4),
        }
    lists = {which: long_list(enclaves.SHA256_ECDSA, 62 * 1024, named=False) for which in ("root_list", "pck_list")}
    return {
        "16 that just fit": lambda digest: (domains.quote(domains.living(), report_data=digest), [bytes(small)] * 16),
        "seven, of texts and lists": tdx_with(info=deep[:63000], identity=deep[:63000], **lists),
        "a signer of 4 KiB of names": tdx_with(signer=named(4000)),
        "a list of names": tdx_with(root_list=long_list(enclaves.SHA256_ECDSA, most, named=True)),
        "a PEM of names": tdx_with(domains.pem(*[named(1600)] * 3)),
        "a chain as long as the quote": tdx_with(long_chain(7000)),
        "base64 of nothing": tdx_with(b"-----BEGIN CERTIFICATE-----\n" * 200 + base64.b64encode(bytes(900))),
    }


def refusal(rogue: Rogue, body: Callable[[], bytes]) -> float:
    """Seconds until stage 1 has refused this ATTEST, which is made once the handshake is over."""
    rogue.shake().hear_attest()
    made = body()
    pieces = [made[i : i + ROOM] for i in range(0, len(made), ROOM)]
    records = [rogue.seal(ATTEST, one, flags=FIN if i == len(pieces) - 1 else 0) for i, one in enumerate(pieces)]
    began = time.monotonic()
    rogue.write(b"".join(records))
    said = [record.kind for record in rogue.last_words()]
    require(said in ([3], []), f"stage 1 said records of types {said}")
    return time.monotonic() - began


@attack(
    81, "endorsements of 16 × 64 KiB; chains, lists, names as long as the wire takes", "refused in 100 ms and 20 MB"
)
def bulk(arena: Arena) -> Seen:
    seen = []
    for kind in ("snp", "tdx"):
        with arena.guests(kind, kind) as pipes:
            provider, claims = Provider[kind.upper()], pipes.manifest.claims(0)
            too_much = struct.pack(">BBHIB", 1, provider, 0, 0, 16) + (struct.pack(">I", 1 << 16) + bytes(1 << 16)) * 16
            cases = bulks(kind)
            before, slowest = arena.memory(1), (0.0, "")
            for name in ("16 of 64 KiB", *cases):
                best = 1e9
                for _ in range(8):  # the best of some: the machine may have other things to do
                    arena.mark()
                    with told(name), as_stage_before(pipes) as rogue:
                        guest = Guest(provider, claims, cases[name]) if name in cases else None
                        body = partial(honest_body, rogue, guest) if guest else lambda data=too_much: data
                        best = min(best, refusal(rogue, body))
                    if best < 0.1:
                        break
                require(best < 0.1, f"{kind}, {name}: it took {1000 * best:.0f} ms, wanted less than 100")
                slowest = max(slowest, (best, name))
                verdict = arena.verdict(1)
                require(verdict in ("EvidenceError", "LimitError"), f"{kind}, {name}: stage 1 ended it for {verdict}")
                seen.append(Seen("(played by the kit)", verdict))
            grown = arena.memory(1) - before
            require(grown < 20 << 20, f"{kind}: stage 1 has grown by {grown >> 20} MB")
            took = f"{slowest[1]} took longest, {1000 * slowest[0]:.1f} ms"
            arena.notes.append(f"81, {kind}: {took}; stage 1 grew by {grown / 1e6:.1f} MB")
            show_stage(arena, honest_body, MAKERS[kind](arena), accepted=True)
            arena.control()
    return together(seen)


def snp_lists() -> dict[str, Case]:
    later = guests.EVER["ends"]
    return {
        "no list": ("min_crl_number", {"listed": ()}),
        "a list of last year": ("collateral-expired", {"listed": [guests.revocations(number=5, **PAST)]}),
        "a list before": ("min_crl_number", {"listed": [guests.revocations(number=4, **guests.EVER)]}),
        "a list without a number": ("min_crl_number", {"listed": [guests.revocations(number=None, **guests.EVER)]}),
        "a list of tomorrow": ("collateral-expired", {"listed": [guests.revocations(begins=later, ends=later)]}),
        "a list of another root": ("chain", {"listed": [guests.revocations(signer=guests.rsa_key(2), **guests.EVER)]}),
        "another product's list": ("chain", {"listed": [guests.revocations(issuer="ARK-Genoa", **guests.EVER)]}),
        "two lists": ("SNP endorsements", {"listed": [NEWEST, NEWEST]}),
        "a list with the ASK": ("revoked", {"listed": [guests.revocations(guests.SERIALS["ask"], **guests.EVER)]}),
    }


def tdx_collateral() -> dict[str, Case]:
    living = domains.living()
    foreign = domains.living(FOREIGN)
    root, authority = living["root"], living["authority"]

    def lists(which: str, who: enclaves.Holder, *serials: int, **changes: Any) -> dict[str, Any]:
        return {"collateral": {which: domains.revocations(who, *serials, **({**guests.EVER} | changes))}}

    def of(change: Callable[[list[bytes]], Sequence[bytes]]) -> dict[str, Any]:
        return {"parts": lambda holders: change(domains.living_collateral(holders))}

    text = json.dumps(domains.info() | {"issueDate": "2020-01-01T00:00:00Z", "nextUpdate": "2049-01-01T00:00:00Z"})
    doubled = text.replace('"version"', '"version": 3, "version"', 1).encode()
    return {
        "an evaluation before": ("min_tcb_evaluation", {"collateral": {"info": {"tcbEvaluationDataNumber": 16}}}),
        "an identity before": ("min_tcb_evaluation", {"collateral": {"identity": {"tcbEvaluationDataNumber": 16}}}),
        "a root list before": ("min_crl_numbers", lists("root_list", root, number=0)),
        "a PCK list before": ("min_crl_numbers", lists("pck_list", authority, number=0)),
        "a root list of last year": ("collateral-expired", lists("root_list", root, **PAST)),
        "a PCK list of last year": ("collateral-expired", lists("pck_list", authority, **PAST)),
        "another root's lists": ("chain", lists("root_list", root, key=FOREIGN)),
        "the lists exchanged": ("chain", of(lambda parts: [*parts[:5], parts[6], parts[5]])),
        "the PCK certificate revoked": ("revoked", lists("pck_list", authority, domains.SERIALS["pck"])),
        "the authority revoked": ("revoked", lists("root_list", root, domains.SERIALS["authority"])),
        "the signer revoked": ("revoked", lists("root_list", root, domains.SERIALS["signer"])),
        "another processor's": ("fmspc", {"collateral": {"info": {"fmspc": "00" * 6}}}),
        "another root's collateral": ("chain", of(lambda _: domains.living_collateral(foreign))),
        "texts signed by somebody": (
            "signature",
            of(lambda parts: [parts[0], domains.signature(FOREIGN, parts[0]), *parts[2:]]),
        ),
        "a text changed": ("signature", of(lambda parts: [parts[0].replace(b"17", b"99", 1), *parts[1:]])),
        "a text without a space": ("signature", of(lambda parts: [parts[0].replace(b" ", b"", 1), *parts[1:]])),
        "the texts exchanged": ("TCB info", of(lambda parts: [*parts[2:4], *parts[:2], *parts[4:]])),
        "a key twice": ("TCB info", {"collateral": {"info": doubled}}),
        "SGX's TCB info": ("TCB info", {"collateral": {"info": {"id": "SGX"}}}),
        "six parts": ("TDX collateral", of(lambda parts: parts[:6])),
        "a signer's namesake": ("chain", {"collateral": {"signer": foreign["signer"].der}}),
    }


@attack(82, "endorsements replayed, expired, revoked, signed by others, or of another platform", REFUSED)
def endorsements(arena: Arena) -> Seen:
    seen = show_all(arena, "snp", snp_lists(), 6) + show_all(arena, "tdx", tdx_collateral(), 8)
    with arena.guests("tdx", "tdx") as pipes:  # a genuine stage to which its host delivers something old
        file = pipes.endorsements / "tcbInfo"
        usual = file.read_bytes()
        older = domains.living_collateral(info={"tcbEvaluationDataNumber": 16})
        put(file, domains.files(domains.living(), older)["tcbInfo"])
        answer = arena.run()
        require(answer["error"] and answer["error"][2] == 3, f"old collateral was believed: {answer}")
        require(says(answer["error"][1], "min_tcb_evaluation: "), f"refused for another reason: {answer['error'][1]}")
        seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), "served nobody"))
        put(file, usual)
        arena.control()
    return together(seen)


def put(file: Path, data: bytes) -> None:
    """As an operator does it, so that nobody reads half of it."""
    new = file.with_name(".new")
    new.write_bytes(data)
    new.rename(file)


@attack(
    83, "a configfs-tsm that is slow, with strangers who want evidence; one that is silent", "others first; in time"
)
def slow(arena: Arena) -> Seen:
    listed, count = KeyPair.generate(), 6
    pipes = arena.start_guests("snp", "snp", flags=["--delay", "0.3"], clients=[listed.public])
    over = threading.Event()

    def stranger() -> None:  # at stage 1, which gives evidence to whoever calls
        while not over.is_set():
            with contextlib.suppress(OSError), from_elsewhere(pipes, 1, 0) as rogue:
                rogue.shake().hear_attest()

    try:
        options: dict[str, Any] = {"stages": pipes, "client_key": listed.private.hex()}
        arena.control(**options)
        before = pipes.answers(0)
        for _ in range(count):  # whoever is not listed costs the platform nothing
            with as_client(pipes) as rogue:
                require(
                    [one.kind for one in rogue.shake().last_words()] == [3], "a client that is not listed got evidence"
                )
        require(pipes.answers(0) == before, "clients that are not listed cost the platform an answer")
        before = pipes.answers(1)
        for _ in range(count):  # who asks at stage 1 and leaves costs an answer at most, and who waits exactly one
            from_elsewhere(pipes, 1, 0).shake().close()
        for _ in range(count):
            with from_elsewhere(pipes, 1, 0) as rogue:
                require(rogue.shake().hear_attest(), "stage 1 gave a stranger no evidence")
        cost = pipes.answers(1) - before
        require(count <= cost <= 2 * count, f"{2 * count} strangers cost the platform {cost} answers")
        crowd = [background(stranger) for _ in range(8)]
        require(eventually(lambda: pipes.answers(1) > before + cost + 2, PATIENCE), "the crowd gets no evidence")
        before, began = pipes.answers(1), time.monotonic()
        arena.control(**options)  # over a new link to stage 1, which stage 0 asks for
        took, answers = time.monotonic() - began, pipes.answers(1) - before
        over.set()
        for one in crowd:
            one.join()
        require(answers <= 6, f"an honest client waited while the platform gave strangers {answers} answers")
        arena.notes.append(
            f"83: among 8 strangers, an answer each 0.3 s: {took:.1f} s, and {answers} answers until served"
        )
        seen = [Seen("the right tokens", f"{cost} answers for {2 * count} strangers")]

        pipes.device(0, "--silent")
        began = time.monotonic()
        answer = arena.run(**options)
        took = time.monotonic() - began
        seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), "the platform is silent"))
        require(took < float(FLAGS[-1]) + PATIENCE, f"a silent platform cost a client {took:.1f} s")
        require(eventually(lambda: "the platform gave none in" in pipes.log(0)), "the stage did not say why")
        for _ in range(count):  # who has no part in it is ended too, and costs no thread for good
            with as_client(pipes) as rogue:
                rogue.shake().last_words()
        threads = len(list(Path(f"/proc/{pipes.processes[0].pid}/task").iterdir()))
        require(threads < 30, f"stage 0 has {threads} threads, with nobody to serve")
        pipes.kill(0)
        pipes.device(0)
        pipes.start(0, *FLAGS, endorsed=True)
        arena.control(**options)
    finally:
        over.set()
        pipes.close()
    return together(seen)


def from_elsewhere(pipes: Pipes, index: int, own: int) -> Rogue:
    """A stranger at a stage's own port, from another address than the proxies'."""
    sock = socket.create_connection(("127.0.0.1", pipes.ports[index]), PATIENCE, source_address=("127.0.0.2", 0))
    return Rogue(sock, "I", pipes.manifest, own, index, suite=pipes.manifest.suites[0])


@attack(84, "manifests that mix platforms: evidence of another stage's platform, under either's name", REFUSED)
def mixed(arena: Arena) -> Seen:
    seen = []
    with arena.guests("tdx", "snp") as pipes:
        claims = pipes.manifest.claims(0)
        report = snp(arena, listed=())
        quote = tdx(arena)
        cases: dict[str, tuple[str, Attester]] = {
            "an SNP guest": ("provider: ", report),
            "an SNP guest that says TDX": ("TDX ", Guest(Provider.TDX, claims, report.make)),
            "a TDX guest that says SNP": ("provider: ", Guest(Provider.SNP, claims, quote.make)),
            "a quote with AMD's endorsements": (
                "TDX collateral: ",
                Guest(Provider.TDX, claims, lambda digest: (quote.make(digest)[0], report.make(digest)[1])),
            ),
            "an enclave": ("provider: ", enclave(arena)),
            "a mock": ("provider: ", mock(pipes)),
        }
        for name, (reason, attester) in cases.items():
            for show in (show_client, show_stage):
                with told(name):
                    seen.append(show(arena, honest_body, attester, reason=reason))
        own = Guest(Provider.TDX, pipes.manifest.claims(1), quote.make)
        for name, attester in (("TDX in SNP's place", own), ("a mock in SNP's place", mock(pipes, 1))):
            with told(name):
                seen.append(show_stage_0(arena, attester))
        weak = json.loads(pipes.bytes)["stages"]
        one, other = weak[0]["evidence"], weak[1]["evidence"]
        for evidence in (one | other, other | one, other | {"provider": "tdx"}, one | {"provider": "snp"},
                         other | {"mrtd": one["mrtd"]}, one | {"measurements": other["measurements"]},
                         other | {"provider": ["snp", "tdx"]}, [one, other]):  # fmt: skip
            path = changed(arena, "mixed", stages=[weak[0], weak[1] | {"evidence": evidence}])
            seen.append(refused_before(arena, manifest=path))
        for show in (show_client, show_stage):
            show(arena, honest_body, tdx(arena), accepted=True)
        arena.control()
    return together(seen)


def mock(pipes: Pipes, index: int = 0) -> MockAttester:
    key = MockKey.generate(pipes.root, index, int(time.time() * 1000) + HOUR)
    return MockAttester(key, pipes.manifest.claims(index), measurement=MEASURED)


def show_stage_0(arena: Arena, attester: Attester) -> Seen:
    """A fake stage 1 shows evidence to the real stage 0, which has a client."""

    def play(rogue: Rogue) -> list[int]:
        rogue.shake()
        rogue.say(ATTEST, honest_body(rogue, attester))
        return [record.kind for record in rogue.last_words()]

    arena.mark()
    with FakeStage(arena.stages, 1, play) as fake:
        answer = arena.run()
        require(eventually(lambda: bool(fake.results), PATIENCE), "stage 0 does not hang up")
        require(fake.results[0] == [3], f"stage 0 said records of types {fake.results[0]}, wanted one ALERT")
    seen = arena.grade(answer, [arena.prompt()], TOKENS)
    require(eventually(lambda: says(arena.said(0), "provider: "), PATIENCE), f"stage 0 said {arena.said(0)[-300:]}")
    return Seen(seen, "stage 0 refused stage 1")
