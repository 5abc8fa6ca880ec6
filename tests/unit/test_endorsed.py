"""How long a stage's endorsements hold, as whoever looks has verified them: days left, and a word below three."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import domains
import enclaves
import guests
import pytest

from attest import Binding, Evidence, Provider, dump_evidence
from minigpt.cli import status
from minigpt.protocol.manifest import Manifest, endorsement_warnings
from minigpt.protocol.messages import StageReport
from unit.test_manifest import NITRO, edited

DAY = timedelta(days=1)
NOW = datetime.now(UTC).replace(microsecond=0)
ENDS = NOW + 2.5 * DAY
SNP = {
    "provider": "snp", "covers": "image", "product": "Milan", "measurements": ["07" * 48], "policy": 0x30000,
    "min_tcb": guests.VERSIONS, "test_root": guests.root(guests.living()).hex(),
}  # fmt: skip
TDX = {"provider": "tdx", "covers": "image", "min_tcb_evaluation": 17} | {
    name: domains.BODY[name].hex()
    for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "td_attributes", "xfam")
} | {"test_root": hashlib.sha256(domains.living()["root"].der).hexdigest()}  # fmt: skip
LIVING = domains.living()
DATES = {"issueDate": domains.date(domains.EVER["begins"]), "nextUpdate": domains.date(domains.EVER["ends"])}


def left(ends: datetime) -> Any:
    """About the days until then, whenever this is asked: tests may have run for an hour before."""
    return pytest.approx((ends - datetime.now(UTC)) / DAY, abs=0.01)


def pinning(evidence: dict[str, Any]) -> Manifest:
    return Manifest.parse(edited("stages", 1, "evidence", to=evidence))


def snp(manifest: Manifest, *lists: bytes) -> str:
    """The file of stage 1's evidence, over the given revocation lists."""
    return file(manifest, Provider.SNP, lambda data: guests.report(report_data=data), [*guests.living(), *lists])


def tdx(manifest: Manifest, **changes: Any) -> str:
    lists = {
        "root_list": domains.revocations(LIVING["root"], **domains.EVER),
        "pck_list": domains.revocations(LIVING["authority"], **domains.EVER),
    }
    parts = domains.collateral(LIVING, **({"info": DATES, "identity": DATES} | lists | changes))
    return file(manifest, Provider.TDX, lambda data: domains.quote(LIVING, report_data=data), parts)


def file(manifest: Manifest, provider: Provider, made: Any, endorsements: list[bytes]) -> str:
    claims = manifest.claims(1)
    binding = Binding("R", provider, b"h" * 32, b"s" * 32, claims)
    return dump_evidence(Evidence(provider, claims, made(binding.digest), tuple(endorsements)), binding)


def test_the_days_left_are_those_of_the_first_endorsement_that_ends() -> None:
    manifest = pinning(SNP)
    forever = manifest.endorsed_days(1, snp(manifest))
    assert forever == left(guests.EVER["ends"])
    for days in (29.0, 2.5):
        listed = guests.revocations(begins=NOW - DAY, ends=NOW + days * DAY)
        assert manifest.endorsed_days(1, snp(manifest, listed)) == left(NOW + days * DAY)
    manifest = pinning(TDX)
    assert manifest.endorsed_days(1, tdx(manifest)) == left(domains.EVER["ends"])
    ending = {"nextUpdate": domains.date(ENDS)}
    for change in (
        {"info": DATES | ending},
        {"identity": DATES | ending},
        {"root_list": domains.revocations(LIVING["root"], begins=domains.EVER["begins"], ends=ENDS)},
        {"pck_list": domains.revocations(LIVING["authority"], begins=domains.EVER["begins"], ends=ENDS)},
    ):
        assert manifest.endorsed_days(1, tdx(manifest, **change)) == left(ENDS)


@pytest.mark.parametrize("who", ["pck", "authority", "root", "signer"])
def test_certificates_end_too(who: str) -> None:
    made = domains.holders(dict.fromkeys(LIVING, domains.EVER) | {who: domains.EVER | {"ends": ENDS}})
    root = hashlib.sha256(made["root"].der).hexdigest()
    manifest = pinning(TDX | {"test_root": root})
    lists = {
        "root_list": domains.revocations(made["root"], **domains.EVER),
        "pck_list": domains.revocations(made["authority"], **domains.EVER),
    }
    parts = domains.collateral(made, info=DATES, identity=DATES, **lists)
    text = file(manifest, Provider.TDX, lambda data: domains.quote(made, report_data=data), parts)
    assert manifest.endorsed_days(1, text) == left(ENDS)


def test_what_is_not_accepted_has_no_day_left() -> None:
    manifest = pinning(SNP)
    over = guests.revocations(begins=NOW - 2 * DAY, ends=NOW - DAY)
    foreign = guests.revocations(begins=NOW - DAY, ends=NOW + 99 * DAY, signer=guests.rsa_key(1))
    for text in (snp(manifest, over), snp(manifest, foreign), snp(pinning(SNP | {"vmpl": 1})), "{}", "nothing"):
        assert manifest.endorsed_days(1, text) == 0.0
    assert pinning(TDX).endorsed_days(1, snp(manifest)) == 0.0


def test_where_nobody_has_to_renew_anything_no_days_are_told() -> None:
    """The mock has no endorsements to renew; AWS makes those of Nitro anew every few hours."""
    manifest = pinning(
        NITRO | {f"pcr{i}": enclaves.PCRS[i].hex() for i in range(3)} | {"test_root": enclaves.ROOT.hex()}
    )
    assert manifest.endorsed_days(0, "whatever the mock says") is None
    assert manifest.endorsed_days(1, "") is None  # a stage that could not be asked
    claims = manifest.claims(1)
    binding = Binding("R", Provider.NITRO, b"h" * 32, b"s" * 32, claims)
    bound: dict[str, Any] = {
        "user_data": binding.digest,
        "nonce": binding.handshake_hash,
        "public_key": binding.static_key,
    }
    text = dump_evidence(Evidence(Provider.NITRO, claims, enclaves.document(**bound), ()), binding)
    result, failures = manifest.judge(1, text)
    assert (failures, result is None) == ((), False)
    assert manifest.endorsed_days(1, text) is None


def test_below_three_days_there_is_a_word_about_it() -> None:
    assert endorsement_warnings(1, None) == endorsement_warnings(1, datetime.now(UTC) + 3.1 * DAY) == []
    (word,) = endorsement_warnings(1, datetime.now(UTC) + 2.5 * DAY)
    assert word.startswith("endorsements of stage 1 end in 2.5 days: renew")


def test_status_tells_what_it_verified_and_not_what_a_stage_says() -> None:
    manifest, ends = pinning(SNP), datetime.now(UTC).replace(microsecond=0) + 2.53 * DAY
    text = snp(manifest, guests.revocations(begins=NOW - DAY, ends=ends))
    state = status.state(manifest, StageReport(1, evidence=text), None)
    assert state["endorsements_expire_days"] == left(ends)
    assert status.shown([state]).splitlines()[0].endswith("accepted under a test's root  endorsements end in 2.5 days")
    lied = json.loads(text)
    lied["endorsements"][-1] = guests.revocations(begins=NOW - DAY, ends=NOW + 99 * DAY, signer=guests.rsa_key(1)).hex()
    assert status.state(manifest, StageReport(1, evidence=json.dumps(lied)), None)["endorsements_expire_days"] == 0.0
    failed = status.state(manifest, StageReport(1, error="stage 1 cannot be reached", reason="failed"), None)
    assert failed["endorsements_expire_days"] is None
