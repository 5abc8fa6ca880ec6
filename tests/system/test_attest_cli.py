"""`python -m attest` as a person or a script runs it: real processes, their output and their exit codes."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import enclaves
import guests
import msgpack
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificates
from made import SMALL

import attest
from attest import NO_CLAIMS, Binding, Evidence, Unattested, dump_evidence
from attest.__main__ import main
from attest.measure import PACKAGES, measure
from attest.providers.mock import MockAttester, MockKey, MockPins, parse_endorsement
from attest.providers.nitro import NitroPins
from minigpt.launch.plan import write
from minigpt.protocol.manifest import Manifest

CHECKOUT = Path(attest.__file__).resolve().parent.parent
CLAIMS = msgpack.packb({"stage": 0, "first_layer": 0, "end_layer": 6, "weights_sha256": b"w" * 32, "note": "\x1b[2J"})
BINDING = Binding("R", 1, b"h" * 32, b"s" * 32, CLAIMS)
ASCII_ONLY = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONIOENCODING": "ascii:strict"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "attest", *map(str, arguments)]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run it; a traceback is never what a user should see."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, env=ASCII_ONLY, check=False, **options
    )
    assert "Traceback" not in done.stderr
    return done


@dataclass
class Keys:
    """What `keygen` made: the folder, the root's public key, and evidence of stage 0 made with its key now."""

    folder: Path
    root: str
    measurement: str
    save: Callable[[Evidence, Binding], Path]
    evidence: Evidence


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    root = run("keygen", "-o", folder / "root.json")
    assert root.returncode == 0
    stage = run("keygen", "--root", folder / "root.json", "--stage", 0, "-o", folder / "stage0.json", "--days", 7)
    assert stage.returncode == 0
    key = MockKey.from_json((folder / "stage0.json").read_text())
    assert stage.stdout.strip() == key.public.hex()

    def save(evidence: Evidence, binding: Binding) -> Path:
        path = folder / f"evidence-{len(list(folder.iterdir()))}.json"
        path.write_text(dump_evidence(evidence, binding))
        return path

    measurement = b"\xab" * 48
    evidence = MockAttester(key, CLAIMS, measurement=measurement).attest(BINDING)
    return Keys(folder, root.stdout.strip(), measurement.hex(), save, evidence)


def verify(keys: Keys, path: object, *more: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return run("verify", path, "--root", keys.root, "--measurement", keys.measurement, *more, **options)


def test_keygen_makes_private_files_and_prints_public_keys(keys: Keys) -> None:
    for name in ("root.json", "stage0.json"):
        assert stat.S_IMODE((keys.folder / name).stat().st_mode) == 0o600
    assert json.loads((keys.folder / "root.json").read_text())["public"] == keys.root
    endorsement = parse_endorsement(keys.evidence.endorsements[0])
    days = (endorsement.not_after_ms / 1000 - time.time()) / 86400
    assert endorsement.stage == 0
    assert 6.9 < days <= 7


def test_keygen_says_what_to_do_next_on_stderr(tmp_path: Path) -> None:
    done = run("keygen", "-o", "root.json", cwd=tmp_path)
    assert len(done.stdout) == 65
    assert "next" in done.stderr
    assert json.loads((tmp_path / "root.json").read_text())["private"] not in done.stdout + done.stderr
    following = done.stderr.split("python -m attest ")[1].split()
    assert run(*following, cwd=tmp_path).returncode == 0
    assert (tmp_path / "stage0.json").exists()


def test_keygen_never_overwrites(tmp_path: Path) -> None:
    existing = tmp_path / "existing"
    existing.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    for path in (existing, link, tmp_path / "no" / "folder"):
        done = run("keygen", "-o", path)
        assert (done.returncode, done.stdout) == (1, "")
        assert str(path) in done.stderr
        if path is existing:
            assert "exists, and a key file is never overwritten: use that one, or choose another name" in done.stderr
    assert existing.read_text() == "precious"
    assert not (tmp_path / "target").exists()


def test_keygen_refuses_a_root_that_is_none(keys: Keys, tmp_path: Path) -> None:
    for name, code in (("stage0.json", 3), ("nowhere", 1)):
        done = run("keygen", "--root", keys.folder / name, "--stage", 1, "-o", tmp_path / "new")
        assert done.returncode == code
        assert not (tmp_path / "new").exists()


def test_measure_prints_96_digits_of_the_code(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    done = run("measure", tmp_path)
    assert (done.returncode, done.stdout) == (0, measure(tmp_path).hex() + "\n")
    shutil.copytree(CHECKOUT / "attest", tmp_path / "attest", dirs_exist_ok=True)
    own = subprocess.run(command("measure"), cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert own.stdout == measure(tmp_path).hex() + "\n"
    assert len(own.stdout) == 97
    nothing = run("measure", tmp_path / "nowhere")
    assert (nothing.returncode, nothing.stdout) == (1, "")


def test_verify_accepts_genuine_evidence_and_prints_the_claims(keys: Keys) -> None:
    path = keys.save(keys.evidence, BINDING)
    for more in ((), ("--stage", 0), ("--at", "now"), ("--measurement", "11" * 48)):
        done = verify(keys, path, *more)
        assert done.returncode == 0, done
        assert done.stdout.splitlines()[0].split() == ["verdict", "accepted"]
        assert "proves nothing about hardware" in done.stdout
        assert f"weights sha256  {(b'w' * 32).hex()}" in done.stdout
        assert ("own time" in done.stdout) == ("--at" not in more)
    report = json.loads(verify(keys, path, "--json").stdout)
    assert report["verdict"] == "accepted"
    assert report["claims"]["end_layer"] == 6
    assert report["at"] == report["made"]


def test_verify_refuses_everything_else_with_3(keys: Keys) -> None:
    genuine = keys.save(keys.evidence, BINDING)
    data = keys.evidence.evidence
    forged = keys.save(replace(keys.evidence, evidence=data[:-1] + bytes([data[-1] ^ 1])), BINDING)
    moved = keys.save(keys.evidence, replace(BINDING, handshake_hash=b"i" * 32))
    short = keys.save(replace(keys.evidence, evidence=data[:-1]), BINDING)
    binding = Binding("I", 0, b"h" * 32, b"s" * 32, NO_CLAIMS)
    nothing = keys.save(Unattested().attest(binding), binding)
    nitro = keys.save(replace(keys.evidence, provider=2), replace(BINDING, provider=2))
    pins = ("--root", keys.root, "--measurement", keys.measurement)
    for arguments, word in (
        ((genuine, "--root", "11" * 32, *pins[2:]), "root"),
        ((genuine, *pins[:2], "--measurement", "11" * 48), "measurement: got abab"),
        ((genuine, *pins, "--stage", 1), "stage 1"),
        ((genuine, *pins, "--at", "2037-01-01T00:00:00Z"), "expired"),
        ((forged, *pins), "signature"),
        ((moved, *pins), "another handshake"),
        ((short, *pins), "225 bytes"),
        ((nothing, *pins), "none (0)"),
        ((nitro, *pins), "got nitro (2), wanted mock (1)"),
        ((keys.folder / "root.json", *pins), "got the mock's private root key, wanted an evidence file"),
    ):
        done = run("verify", *arguments)
        assert done.returncode == 3, arguments
        assert done.stdout.startswith("verdict           refused\n  ")
        assert word in done.stdout
    report = json.loads(
        run("verify", genuine, "--root", keys.root, "--measurement", "11" * 48, "--stage", 1, "--json").stdout
    )
    assert report["verdict"] == "refused"
    assert [reason.split(":")[0] for reason in report["reasons"]] == ["measurement", "key"]


def test_show_says_that_it_verifies_nothing(keys: Keys) -> None:
    data = keys.evidence.evidence
    forged = keys.save(replace(keys.evidence, evidence=data[:-1] + bytes([data[-1] ^ 1])), BINDING)
    done = run("show", forged)
    assert done.returncode == 0
    assert "not verified" in done.stdout
    assert "proves nothing about hardware" in done.stdout
    assert keys.measurement in done.stdout
    report = json.loads(run("show", forged, "--json").stdout)
    assert report["verified"] is False
    assert report["endorsed"][0]["stage"] == 0


def test_show_reads_every_provider(keys: Keys) -> None:
    binding = Binding("I", 0, b"h" * 32, b"s" * 32, NO_CLAIMS)
    assert "no evidence" in run("show", keys.save(Unattested().attest(binding), binding)).stdout
    for provider in (5, 9):  # which no platform has
        binding = Binding("R", provider, b"h" * 32, b"s" * 32, b"\xc1")
        path = keys.save(Evidence(provider, b"\xc1", b"\1\2", (b"\3",)), binding)
        done = run("show", path)
        assert done.returncode == 0
        assert "unknown to this version" in done.stdout
        assert json.loads(run("show", path, "--json").stdout)["evidence"] == "0102"


def test_a_file_cannot_drive_the_terminal(keys: Keys) -> None:
    path = keys.save(keys.evidence, BINDING)
    for done in (run("show", path), verify(keys, path), run("show", path, "--json")):
        assert "\x1b" not in done.stdout + done.stderr
        assert "[2J" in done.stdout


def test_evidence_is_read_from_stdin_too(keys: Keys) -> None:
    assert verify(keys, "-", input=dump_evidence(keys.evidence, BINDING)).returncode == 0


def test_a_malformed_file_is_3_and_a_missing_one_is_1(tmp_path: Path) -> None:
    for text in ("", "{}", "x" * 1_000_000):
        (tmp_path / "file").write_text(text)
        assert run("show", tmp_path / "file").returncode == 3
    assert run("show", tmp_path / "missing").returncode == 1
    assert run("show", tmp_path).returncode == 1


def test_wrong_usage_is_2(keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One real process; the others by `main`."""
    done = run("keygen")
    assert (done.returncode, done.stdout) == (2, "")
    path, new = keys.save(keys.evidence, BINDING), tmp_path / "new"
    for arguments in (
        (),
        ("sign",),
        ("keygen", "-o", new, "--stage", 0),
        ("keygen", "-o", new, "--days", 3),
        ("keygen", "-o", new, "--root", keys.folder / "root.json"),
        ("keygen", "-o", new, "--root", keys.folder / "root.json", "--stage", 65535),
        ("keygen", "-o", new, "--root", keys.folder / "root.json", "--stage", -1),
        ("keygen", "-o", new, "--root", keys.folder / "root.json", "--stage", 0, "--days", 0),
        ("verify", path),
        ("verify", path, "--root", keys.root),
        ("verify", path, "--measurement", keys.measurement),
        ("verify", path, "--root", keys.root[1:], "--measurement", keys.measurement),
        ("verify", path, "--root", keys.root, "--measurement", "00" * 48),
        ("verify", path, "--root", keys.root, "--measurement", "zz" * 48),
        ("verify", path, "--root", keys.root, "--measurement", keys.measurement, "--at", "2027-01-31"),
        ("show",),
        ("show", path, "--jso"),
    ):
        assert main([str(argument) for argument in arguments]) == 2, arguments
        output, errors = capsys.readouterr()
        assert (output, errors.count("\n")) == ("", 1), arguments
    assert not new.exists()


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("attest ")


def test_a_closed_pipe_ends_quietly_and_keeps_the_verdict(keys: Keys) -> None:
    path = keys.save(keys.evidence, BINDING)
    pins = ("--root", keys.root, "--measurement")
    for arguments, code in (
        (("show", path), 0),
        (("verify", path, *pins, keys.measurement), 0),
        (("--help",), 0),
        (("verify", path, *pins, "11" * 48), 3),
    ):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = subprocess.run(
                command(*arguments), stdout=writing, stderr=subprocess.PIPE, env=ASCII_ONLY, timeout=60, check=False
            )
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (code, b""), arguments


def test_an_interrupt_is_130_without_a_traceback(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # A shell's background job inherits an ignored SIGINT, so the handler is set as a terminal's program has it.
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('attest', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "show", str(pipe)],
        env=ASCII_ONLY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with open(pipe, "wb"):  # opens once the command has opened it to read
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, b"", b"")


# --- Nitro documents, and manifests ---

PCRS = dict.fromkeys(range(3), b"\7" * 48)


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    """A manifest of a Nitro stage and a mock stage."""
    path = tmp_path_factory.mktemp("pinned") / "manifest.json"
    mock = MockPins(bytes.fromhex(keys.root), frozenset([bytes.fromhex(keys.measurement)]))
    path.write_bytes(
        write(
            config=SMALL, model="x", revision=None, tokenizer_sha256=None, layers=[range(3), range(3, 4)],
            weights_sha256=[b"\1" * 32] * 2,
            pins=[NitroPins(PCRS), mock],
        )
    )  # fmt: skip
    return path


def results(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The verdict of each check, by its name."""
    return {line.split(":")[0].split(" ", 1)[1]: line.split(" ")[0] for line in done.stdout.splitlines()[:-1]}


def test_verify_prints_a_line_for_each_check_of_a_raw_document(pinned: Path, tmp_path: Path) -> None:
    path = tmp_path / "document.bin"
    path.write_bytes(enclaves.document(pcrs=PCRS | {2: b"\x08" * 48}))
    done = run("verify", path, "--manifest", pinned, "--stage", 0)
    assert done.returncode == 3
    assert results(done) == {
        "malformed": "PASS", "alg": "PASS", "chain": "FAIL", "not-yet-valid": "PASS", "expired": "PASS",
        "signature": "PASS", "stale": "PASS", "binding": "SKIP", "claims": "SKIP", "debug": "PASS", "pcr0": "PASS",
        "pcr1": "PASS", "pcr2": "FAIL",
    }  # fmt: skip
    assert f"FAIL pcr2: got {'08' * 48}, wanted {'07' * 48}; the application is not what was pinned" in done.stdout
    assert done.stdout.splitlines()[-1] == "verdict: refused, as of 2027-01-15T12:00:00.000Z"
    report = json.loads(run("verify", path, "--manifest", pinned, "--stage", 0, "--json").stdout)
    assert report["verdict"] == "refused"
    assert {check["check"]: check["result"] for check in report["checks"]} == results(done)
    late = results(run("verify", path, "--manifest", pinned, "--stage", 0, "--at", "2031-01-01T00:00:00Z"))
    assert (late["expired"], late["stale"], late["signature"]) == ("FAIL", "FAIL", "PASS")
    path.write_bytes(enclaves.document()[:-1])
    assert results(run("verify", path, "--manifest", pinned, "--stage", 0)) == {"malformed": "FAIL"}
    wrong = run("verify", path, "--manifest", pinned, "--stage", 1)
    assert wrong.returncode == 3
    assert "FAIL provider: got a Nitro document, wanted mock evidence" in wrong.stdout
    shown = run("show", path)
    assert shown.returncode == 3
    path.write_bytes(enclaves.document(module_id="\x1b[2J"))
    shown = run("show", path)
    assert shown.returncode == 0
    assert "binding: not checked" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_a_genuine_document_is_accepted_by_its_own_pins(vectors: Path, pinned: Path, tmp_path: Path) -> None:
    sample = vectors / "nitro" / "prod_2022.bin"
    told = run("show", "--pins", sample)
    assert told.returncode == 0
    assert "compare" in told.stderr
    manifest = json.loads(pinned.read_bytes())
    manifest["stages"][0]["evidence"] = json.loads(told.stdout)
    path = tmp_path / "own.json"
    path.write_text(json.dumps(manifest))
    done = run("verify", sample, "--manifest", path, "--stage", 0)
    assert done.returncode == 0, done.stdout
    assert set(results(done).values()) == {"PASS", "SKIP"}
    assert run("verify", sample, "--manifest", path, "--stage", 0, "--at", "now").returncode == 3
    assert "debug: got on" in run("show", "--pins", vectors / "nitro" / "debug_2022.bin").stderr
    (tmp_path / "foreign.bin").write_bytes(enclaves.document())
    foreign = run("show", "--pins", tmp_path / "foreign.bin")
    assert (foreign.returncode, foreign.stdout) == (3, "")


def test_evidence_files_are_checked_against_a_manifest(keys: Keys, pinned: Path) -> None:
    from attest.commands import _pinned

    claims = Manifest.parse(pinned.read_bytes()).claims(0)
    assert _pinned(str(pinned), 0)[2] == claims
    binding = Binding("R", 2, b"h" * 32, b"s" * 32, claims)
    document = enclaves.document(
        pcrs=PCRS, user_data=binding.digest, nonce=binding.handshake_hash, public_key=binding.static_key
    )
    path = keys.save(Evidence(2, claims, document, ()), binding)
    done = results(run("verify", path, "--manifest", pinned, "--stage", 0))
    assert [name for name, result in done.items() if result != "PASS"] == ["chain"]
    assert {"binding", "claims", "debug", "pcr0"} <= done.keys()
    path = keys.save(keys.evidence, BINDING)  # its claims are none of this manifest
    done = results(run("verify", path, "--manifest", pinned, "--stage", 1))
    assert done["endorsement"] == done["evidence"] == done["measurement"] == "PASS"
    assert done["claims"] == done["key"] == "FAIL"


# --- SNP reports ---


@pytest.fixture
def genuine(vectors: Path, tmp_path: Path) -> Path:
    """A folder of endorsements of snp/milan_prod_report.bin, as a person would download them."""
    folder = tmp_path / "endorsements"
    folder.mkdir()
    for name in ("milan_prod_vcek.der", "milan_ask_ark.pem"):
        (folder / name).write_bytes((vectors / "snp" / name).read_bytes())
    return folder


def test_a_genuine_report_is_planned_and_accepted_by_its_own_pins(
    vectors: Path, pinned: Path, genuine: Path, tmp_path: Path
) -> None:
    report = vectors / "snp" / "milan_prod_report.bin"
    told = run("show", "--pins", report, "--endorsements", genuine, "--at", "2026-11-01T00:00:00Z")
    assert told.returncode == 0, told.stderr
    assert "compare" in told.stderr
    own = json.loads(told.stdout)
    assert own["min_tcb"] == {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115}
    manifest = json.loads(pinned.read_bytes())
    manifest["stages"][0]["evidence"] = own
    path = tmp_path / "own.json"
    path.write_text(json.dumps(manifest))
    words = (report, "--endorsements", genuine, "--manifest", path, "--stage", 0, "--at", "2026-11-01T00:00:00Z")
    done = run("verify", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(done)
    assert {name for name, result in found.items() if result == "SKIP"} == {"binding", "claims"}
    assert {"measurements", "policy", "min_tcb", "product"} <= found.keys()
    manifest["stages"][0]["evidence"] = own | {"measurements": ["08" * 48], "min_tcb": own["min_tcb"] | {"snp": 9}}
    path.write_text(json.dumps(manifest))
    done = run("verify", *words)
    assert done.returncode == 3
    assert [name for name, result in results(done).items() if result == "FAIL"] == ["measurements", "min_tcb"]
    assert "FAIL min_tcb: got reported snp 8, wanted at least 9; update the platform's firmware" in done.stdout
    late = results(run("verify", *words[:-1], "2031-01-01T00:00:00Z"))
    assert late["expired"] == "FAIL"
    assert results(run("verify", report, "--manifest", path, "--stage", 0)) == {"malformed": "FAIL"}
    assert "got an SNP report, wanted mock evidence" in run("verify", report, "--manifest", path, "--stage", 1).stdout


def test_a_report_of_a_debug_guest_or_a_foreign_root_pins_nothing(vectors: Path, genuine: Path, tmp_path: Path) -> None:
    (genuine / "debug.der").write_bytes((vectors / "snp" / "milan_debug_vcek.der").read_bytes())
    done = run("show", "--pins", vectors / "snp" / "milan_debug_report.bin", "--endorsements", genuine)
    assert (done.returncode, done.stdout) == (3, "")
    assert "debug: got on" in done.stderr
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for number, data in enumerate(guests.chain()):
        (foreign / str(number)).write_bytes(data)
    (tmp_path / "report.bin").write_bytes(guests.report())
    done = run("show", "--pins", tmp_path / "report.bin", "--endorsements", foreign)
    assert (done.returncode, done.stdout) == (3, "")
    assert "chain: got the root" in done.stderr
    shown = run("show", tmp_path / "report.bin")
    assert shown.returncode == 0
    assert "07" * 48 in shown.stdout
    assert "binding: not checked" in shown.stdout
    missing = run("show", "--pins", tmp_path / "report.bin", "--endorsements", genuine)
    assert "kdsintf.amd.com/vcek/v1/Milan/" in missing.stderr


# --- TDX quotes ---


@pytest.fixture
def guest(vectors: Path, keys: Keys, pinned: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A genuine quote with its collateral, and a manifest that pins what runs there."""
    read = json.loads((vectors / "tdx" / "v4_prod_phala_collateral.json").read_bytes())
    signer = load_pem_x509_certificates(read["tcb_info_issuer_chain"].encode())[0]
    parts = (
        read["tcb_info"].encode(), bytes.fromhex(read["tcb_info_signature"]), read["qe_identity"].encode(),
        bytes.fromhex(read["qe_identity_signature"]), signer.public_bytes(Encoding.DER),
        bytes.fromhex(read["root_ca_crl"]), bytes.fromhex(read["pck_crl"]),
    )  # fmt: skip
    quote = (vectors / "tdx" / "v4_prod_phala.bin").read_bytes()
    evidence = keys.save(Evidence(4, NO_CLAIMS, quote, parts), Binding("R", 4, b"h" * 32, b"s" * 32, NO_CLAIMS))
    told = run("show", "--pins", evidence, "--at", "2025-06-25T00:00:00Z")
    assert told.returncode == 0, told.stderr
    assert "compare" in told.stderr
    manifest = json.loads(pinned.read_bytes())
    manifest["stages"][0]["evidence"] = json.loads(told.stdout)
    path = tmp_path / "tdx.json"
    path.write_text(json.dumps(manifest))
    return evidence, path


def test_a_quotes_pins_are_told_and_compared(guest: tuple[Path, Path], tmp_path: Path) -> None:
    evidence, path = guest
    now = ("--at", "2025-06-25T00:00:00Z")
    done = run("verify", evidence, "--manifest", path, "--stage", 0, *now)
    assert done.returncode == 3
    assert {name for name, result in results(done).items() if result == "FAIL"} == {"binding", "claims"}  # another's
    assert "PASS min_tcb_evaluation: at least 17" in done.stdout
    assert "PASS mrtd: 91eb2b44" in done.stdout
    late = run("verify", evidence, "--manifest", path, "--stage", 0)
    assert results(late)["collateral-expired"] == "FAIL"
    assert late.returncode == 3
    manifest = json.loads(path.read_bytes())
    manifest["stages"][0]["evidence"] |= {"min_tcb_evaluation": 18, "rtmr3": "11" * 48}
    path.write_text(json.dumps(manifest))
    done = run("verify", evidence, "--manifest", path, "--stage", 0, *now)
    assert "FAIL min_tcb_evaluation: got 17, wanted at least 18; an old collateral may be replayed" in done.stdout
    assert results(done)["rtmr3"] == "FAIL"


def test_a_bare_quote_is_read_and_says_nothing_of_its_platform(guest: tuple[Path, Path], vectors: Path) -> None:
    sample = vectors / "tdx" / "v4_prod_phala.bin"
    done = run("verify", sample, "--manifest", guest[1], "--stage", 0)
    found = results(done)
    assert done.returncode == 3
    assert {name for name, result in found.items() if result == "FAIL"} == {"collateral-required", "min_tcb_evaluation"}
    skipped = {
        "binding",
        "claims",
        "collateral-expired",
        "revoked",
        "fmspc",
        "module",
        "qe-identity",
        "tcb",
        "statuses",
    }
    assert {name for name, result in found.items() if result == "SKIP"} == skipped | {"advisories"}
    assert found["signature"] == found["mrtd"] == found["debug"] == "PASS"
    assert "wanted mock evidence" in run("verify", sample, "--manifest", guest[1], "--stage", 1).stdout
    shown = run("show", sample)
    assert shown.returncode == 0
    assert "binding: not checked" in shown.stdout
    assert (
        "91eb2b44d141d4ece09f0c75c2c53d247a3c68edd7fafe8a3520c942a604a407de03ae6dc5f87f27428b2538873118b7"
        in shown.stdout
    )
    assert "collateral-required" in run("show", "--pins", sample).stderr


@pytest.mark.parametrize(
    "words",
    [(), ("--manifest", "m.json"), ("--stage", "0"), ("--root", "11" * 32), ("--manifest", "m.json", "--stage", "0",
     "--root", "11" * 32), ("--root", "11" * 32, "--measurement", "11" * 48, "--manifest", "m.json", "--stage", "0")],
)  # fmt: skip
def test_verify_wants_pins_of_one_kind(words: tuple[str, ...]) -> None:
    assert run("verify", "x", *words).returncode == 2
