"""The command line of evidence: `python -m attest keygen | measure | show | verify`.

Results go to standard output, advice and errors to standard error.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from attest import (
    MAX_FILE,
    NO_CLAIMS,
    AttestationError,
    Binding,
    Evidence,
    EvidenceError,
    Failure,
    PolicyError,
    Provider,
    certificates,
    load_evidence,
    provider_name,
)
from attest.arguments import Parser
from attest.document import (
    MANIFEST,
    DocumentError,
    check_kind,
    load,
    public_key,
    read_file,
    read_private,
    refuse_private,
    show,
    write_private,
)
from attest.measure import measure
from attest.policy import CLIENT_ID, Policy, Scalar, date, decode_claims, encode_claims, show_scalar
from attest.providers import ANY_CODE, TEST_ROOT_WARNING, Platform, nitro, snp, tdx
from attest.providers.mock import MAX_SKEW, MockKey, MockRoot, authenticate, parse_evidence
from attest.registry import PLATFORMS

MAX_MANIFEST = 2**20  # bytes
_VENDORS: dict[int, ModuleType] = {Provider.NITRO: nitro, Provider.SNP: snp, Provider.TDX: tdx}
# What their platforms give, by itself.
_RAW: dict[int, str] = {Provider.NITRO: "a Nitro document", Provider.SNP: "an SNP report", Provider.TDX: "a TDX quote"}
_TO_BE_PINNED = ("vmpl", "statuses")  # what a manifest has to name to accept it, and no reason to show no pins
DAYS = 90  # of a stage key's endorsement, by default; what certificate authorities on the web have come down to


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Only a help and a version leave by SystemExit (argparse)."""
    parser = _parser()
    try:
        try:
            refuse_private(sys.argv[1:] if arguments is None else arguments)
            options = parser.parse_args(arguments)
            code, text = options.run(options, parser)
        except SystemExit:  # argparse has printed a help or a version
            _print("")
            raise
        _print(text)
        return int(code)
    except AttestationError as error:
        print(f"attest: {error}", file=sys.stderr)
        return error.exit_code
    except DocumentError as error:  # of the arguments
        print(f"attest: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"attest: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        return 1


def _print(text: str) -> None:
    """Prints and flushes. A reader that has gone has seen enough: that is no error, and the exit code stands."""
    with suppress(BrokenPipeError):
        show(text)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m attest",
        allow_abbrev=False,
        description="Make mock keys, measure the code, read evidence.",
        epilog="exit codes: 0 done or accepted, 1 failed, 2 usage, 3 refused or malformed evidence, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"attest {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., Any], summary: str, about: str | None = None) -> argparse.ArgumentParser:
        made = commands.add_parser(name, allow_abbrev=False, help=summary, description=about)
        made.set_defaults(run=run)
        return made

    keygen = command("keygen", _keygen, "make a mock root key, or a stage's key",
                     "Without --root, make a root key; with --root and --stage, a stage's key. The new public key is "
                     "printed, as 64 hex digits.")  # fmt: skip
    keygen.add_argument("-o", "--output", type=Path, required=True, metavar="FILE",
                        help="where the private key goes: a new file, readable by you alone")  # fmt: skip
    keygen.add_argument("--root", metavar="FILE", help="the root key that endorses")
    stage = partial(_number, "a stage's index", 0, CLIENT_ID - 1)
    keygen.add_argument("--stage", type=stage, metavar="I", help="index of the stage that the key is for")
    days = partial(_number, "a number of days", 1, 36500)
    keygen.add_argument("--days", type=days, metavar="N", help=f"how long the endorsement is valid (default: {DAYS})")

    measuring = command("measure", _measure, "print the measurement of the code",
                        "SHA-384 over names and contents of the *.py of attest, minigpt and transport. Dependencies "
                        "and the interpreter are not measured.")  # fmt: skip
    measuring.add_argument("folder", nargs="?", type=Path, metavar="DIR",
                           help="the folder of the packages (default: the one this program runs from)")  # fmt: skip

    show = command("show", _show, "print what an evidence file says, unverified")
    verify = command("verify", _verify, "check an evidence file against pins",
                     "With --manifest and --stage, check everything that the stage's peers check, and print a line for "
                     "each check. With --root and --measurement, check mock evidence; its claims are printed, not "
                     "compared.")  # fmt: skip
    for reading in (show, verify):
        reading.add_argument("file", metavar="FILE", help="from `minigpt status --save-evidence`, a Nitro document, "
                             "SNP report or TDX quote as the platform gives it; - is standard input")  # fmt: skip
        reading.add_argument("--endorsements", metavar="DIR", help="what the maker says of the platform of a bare SNP "
                             "report or TDX quote: AMD's certificates, or Intel's collateral")  # fmt: skip
        reading.add_argument("--at", type=_time, metavar="TIME",
                             help="judge as of this time: now, or like 2027-01-31T12:00:00Z (default: the evidence's "
                             "own time if it says one, because a kept file is always old)")  # fmt: skip
        reading.add_argument("--json", action="store_true", help="print one JSON object")
    show.add_argument("--pins", action="store_true", help="if the file is authentic, print what a manifest would pin")
    verify.add_argument("--manifest", metavar="FILE", help="compare with what this manifest pins for --stage")
    verify.add_argument("--allow-test-root", action="store_true", help="judge by the root that the manifest names, if "
                        "it is not the vendor's: that proves nothing about hardware")  # fmt: skip
    verify.add_argument("--root", type=_public_key, metavar="HEX", help="the mock root's public key, 64 digits")
    verify.add_argument("--measurement", type=partial(_hex, 48), action="append", metavar="HEX",
                        help="an acceptable measurement, 96 digits; repeatable")  # fmt: skip
    verify.add_argument("--stage", type=stage, metavar="I", help="which stage it is; without --manifest: refuse a key "
                        "endorsed for another")  # fmt: skip
    return parser


def _keygen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[int, str]:
    if (options.root is None) != (options.stage is None):
        parser.error("keygen: a stage's key needs both --root and --stage; a root key needs neither")
    if options.root is None:
        if options.days is not None:
            parser.error("keygen: --days is for a stage's key; a root key does not expire")
        key: MockRoot | MockKey = MockRoot.generate()
        advice = (
            f"root key in {options.output}: keep it away from the stages; pin the public key below in the manifest\n"
            f"next, for each stage: python -m attest keygen --root {options.output} --stage 0 -o stage0.json"
        )
    else:
        data = sys.stdin.buffer.read(MAX_FILE + 1) if options.root == "-" else read_private(options.root, MAX_FILE)
        try:
            root = MockRoot.from_json(data)
        except EvidenceError as error:
            raise EvidenceError(f"--root {options.root}: {str(error).removeprefix('file: ')}") from None
        not_after_ms = int(time.time() * 1000) + (options.days or DAYS) * 86_400_000
        key = MockKey.generate(root, options.stage, not_after_ms)
        advice = (
            f"key of stage {options.stage} in {options.output}, endorsed by root {root.public.hex()} "
            f"until {date(not_after_ms)}\n"
            f"next, on the stage's machine: python -m minigpt.stage --manifest pipeline.json --index {options.stage} "
            f"--mock-key {options.output} --allow-mock --model DIR"
        )
    try:
        write_private(options.output, key.to_json())
    except FileExistsError as error:
        kept = "exists, and a key file is never overwritten: use that one, or choose another name"
        raise FileExistsError(error.errno, kept, error.filename) from None
    print(advice, file=sys.stderr)
    return 0, key.public.hex() + "\n"


def _measure(options: argparse.Namespace, _: argparse.ArgumentParser) -> tuple[int, str]:
    return 0, measure(options.folder).hex() + "\n"


def _show(options: argparse.Namespace, _: argparse.ArgumentParser) -> tuple[int, str]:
    data = _read(options.file)
    try:
        evidence, binding = _load(data, options.endorsements)
    except EvidenceError as error:
        raise EvidenceError(f"{options.file}: {error}") from None
    if options.pins:
        return 0, _pins(evidence, options.at)
    fields, warnings = _said(evidence, binding)
    notes = ["shown, not verified: anybody can write such a file; use `python -m attest verify`", *warnings]
    return 0, _report(options, {"verified": False, "notes": notes, **fields}, [*notes, *_lines(fields)])


def _pins(evidence: Evidence, at_ms: int | None) -> str:
    """What a manifest would pin of authentic evidence, judged as of a time, or its own.

    Raises EvidenceError, and PolicyError if it is of a debug environment.
    """
    module = _VENDORS.get(evidence.provider)
    if module is None:
        wanted = " or ".join(map(provider_name, _VENDORS))
        raise EvidenceError(f"pins: got evidence of {provider_name(evidence.provider)}, wanted {wanted}", "provider")
    made = at_ms or _own_time(evidence)
    statement = module.authenticate(evidence.evidence, evidence.endorsements, None, _moment(made))
    wrong = [failure for failure in module.failures(statement, ANY_CODE) if failure[0] not in _TO_BE_PINNED]
    if wrong:  # nothing of a debug environment can be pinned
        raise PolicyError(*(sentence for _, sentence in wrong))
    told = f"at {date(made)}" if evidence.provider == Provider.NITRO else "there"
    print(f"this is what ran {told}: compare it with what you built; copied, it pins whatever the host chose to run",
          file=sys.stderr)  # fmt: skip
    return json.dumps(module.pinned(statement).to_json(), indent=2) + "\n"


def _verify(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[int, str]:
    by_hand, by_manifest = options.root and options.measurement, options.manifest and options.stage is not None
    if bool(by_hand) == bool(by_manifest) or (options.manifest and (options.root or options.measurement)):
        parser.error("verify: wanted --manifest and --stage; or, for mock evidence, --root and --measurement")
    if by_manifest:
        return _verify_by_manifest(options)
    try:
        evidence, binding = load_evidence(_read(options.file))
        at_ms = options.at
        if not at_ms:
            at_ms = parse_evidence(evidence.evidence).timestamp_ms if evidence.provider == Provider.MOCK else 0
        result = authenticate(evidence, binding, options.root, at_ms)
        stage = result.stage if options.stage is None else options.stage
        Policy(Provider.MOCK, frozenset(options.measurement), result.claims, stage or 0).check(result)
    except AttestationError as error:
        reasons = getattr(error, "mismatches", (str(error),))
        lines = ["verdict           refused", *(f"  {reason}" for reason in reasons)]
        return error.exit_code, _report(options, {"verdict": "refused", "reasons": reasons}, lines)
    fields, warnings = _said(evidence, binding)
    window = f"as asked, within {MAX_SKEW} s" if options.at else "the evidence's own time, which its signer chose"
    notes = [
        *warnings,
        f"judged as of {date(at_ms)} ({window}), when its key's endorsement was valid",
        "not compared: the claims, and which session the handshake hash belongs to",
    ]
    fields = {"verdict": "accepted", **fields}
    lines = [*_lines(fields), *(f"note: {note}" for note in notes)]
    return 0, _report(options, {"at": date(at_ms), "notes": notes, **fields}, lines)


def _verify_by_manifest(options: argparse.Namespace) -> tuple[int, str]:
    """Everything that a peer checks, a line for each check."""
    platform, pins, claims, test_root = _pinned(options.manifest, options.stage)
    if test_root is not None:
        warning = TEST_ROOT_WARNING.format(stage=options.stage, root=test_root.hex())
        if not options.allow_test_root:
            raise AttestationError(f"{warning}: refused without --allow-test-root")
        print(f"attest: {warning}", file=sys.stderr)
    data = _read(options.file)
    failures: Sequence[Failure] = ()
    skipped = {}
    at_ms = options.at
    try:
        evidence, binding = _load(data, options.endorsements)
        if evidence.provider == platform.provider:
            at_ms = at_ms or _own_time(evidence)
        if binding is None:
            skipped = dict.fromkeys(("binding", "claims"), f"not checked: {_RAW[evidence.provider]} by itself belongs "
                                    "to no handshake")  # fmt: skip
            if platform.provider != evidence.provider:
                got = _RAW[evidence.provider]
                raise EvidenceError(f"provider: got {got}, wanted {platform.name} evidence", "provider")
            module = _VENDORS[evidence.provider]
            roots = module.ROOTS if test_root is None else {test_root}
            statement, wrong = module.examine(data, evidence.endorsements, roots, _moment(at_ms))
            failures = [*wrong, *module.failures(statement, pins.to_json())]
        else:
            clock = _moment(at_ms or 0).timestamp
            platform.judge(pins, test_root, claims, options.stage, clock).verify(evidence, binding)
    except (EvidenceError, PolicyError) as error:
        failures = error.failures
    lines = platform.lines(pins, failures, skipped)
    verdict = "refused" if failures else "accepted"
    at = date(at_ms) if at_ms else None  # none if the evidence does not say
    told = [*map(str, lines), f"verdict: {verdict}" + (f", as of {at}" if at else "")]
    fields = {
        "verdict": verdict,
        "at": at,
        "checks": [{"check": line.name, "result": line.result, "text": line.text} for line in lines],
    }
    return EvidenceError.exit_code if failures else 0, _report(options, fields, told)


def _pinned(path: str, index: int) -> tuple[Platform, Any, bytes, bytes | None]:
    """The platform, pins, claims and test root of a manifest's stage. Raises DocumentError; the rest of it is not
    looked at."""
    data = read_file(path, MAX_MANIFEST)
    check_kind(path, data, MANIFEST, "the file that `minigpt plan` or `up` wrote")
    stages = load("manifest", data, MAX_MANIFEST).get("stages").items(1, 256)
    if index >= len(stages):
        raise DocumentError(f"--stage {index}: the manifest has {len(stages)} stages, from 0 on")
    stage = stages[index]
    evidence, layers = stage.get("evidence"), stage.get("layers").items(2, 2)
    provider = evidence.get("provider")
    if provider.value not in list(PLATFORMS):
        provider.refuse(" or ".join(PLATFORMS))
    first, end = (layer.integer(0, 2**16) for layer in layers)
    platform, weights = PLATFORMS[provider.value], stage.get("weights_sha256").bytes(32)
    manifest = hashlib.sha256(data).digest()
    claims: dict[str, Scalar] = {"end": end, "first": first, "manifest": manifest, "stage": index, "weights": weights}
    pins, test_root = platform.read(evidence)
    return platform, pins, encode_claims(claims), test_root


def _load(data: bytes, folder: str | None) -> tuple[Evidence, Binding | None]:
    """An evidence file; or what a platform made, bound to nothing that is known: a Nitro document, or an SNP report
    or a TDX quote, with the endorsements of a folder. Raises AttestationError."""
    if data[:1] in (b"\x84", b"\x9f"):  # how such a document begins, and no text does
        return Evidence(Provider.NITRO, NO_CLAIMS, data, ()), None
    if len(data) == snp.SIZE and data[1:4] == b"\0\0\0":  # as its version has it, and no text
        found = snp.endorsements(snp.parse(data), certificates.in_files(certificates.files(folder))) if folder else ()
        return Evidence(Provider.SNP, NO_CLAIMS, data, found), None
    if data.startswith(tdx.BEGINS):
        found = tdx.endorsements(tdx.parse(data), certificates.files(folder)) if folder else ()
        return Evidence(Provider.TDX, NO_CLAIMS, data, found), None
    try:
        return load_evidence(data)
    except EvidenceError as error:
        raise EvidenceError(str(error).removeprefix("file: ")) from None


def _own_time(evidence: Evidence) -> int:
    """When evidence was made, by itself, in ms since the epoch; now if it does not say. Raises EvidenceError."""
    if evidence.provider == Provider.MOCK:
        return parse_evidence(evidence.evidence).timestamp_ms
    if evidence.provider == Provider.NITRO:
        return nitro.parse(evidence.evidence).statement.timestamp
    return int(time.time() * 1000)  # others do not say, and certificates that are still good are good enough


def _moment(milliseconds: int) -> datetime:
    """A time of this calendar; its end for any later one."""
    return datetime.fromtimestamp(min(milliseconds / 1000, 253_402_300_799), UTC)


def _said(evidence: Evidence, binding: Binding | None) -> tuple[dict[str, Any], list[str]]:
    """What a file says, and what to warn of. Raises EvidenceError where its evidence is malformed."""
    provider = provider_name(evidence.provider)
    platform = next((each for each in PLATFORMS.values() if each.provider == evidence.provider), None)
    warnings = []
    if evidence.provider == Provider.NONE:
        warnings.append("there is no evidence in this file: nothing vouches for that end")
    elif platform is None:
        warnings.append(f"evidence of provider {provider} is unknown to this version")
    elif platform.simulated:
        warnings.append(
            f"{platform.name} evidence proves nothing about hardware: whoever holds the key can claim any measurement"
        )

    fields: dict[str, Any] = {"provider": provider}
    if binding is not None:
        fields["role"] = "initiator" if binding.role == "I" else "responder"
    if platform is not None:
        fields |= platform.describe(evidence)
    elif evidence.evidence or evidence.endorsements:  # a layout that this version does not know
        fields |= {"evidence": evidence.evidence, "endorsed": [item.hex() for item in evidence.endorsements]}
    if binding is None:
        return fields, [*warnings, "binding: not checked"]
    claims = decode_claims(evidence.claims)
    fields |= {
        "handshake_hash": binding.handshake_hash,
        "static_key": binding.static_key,
        "claims": evidence.claims if claims is None else claims,
    }
    return fields, warnings


def _report(options: argparse.Namespace, fields: dict[str, Any], lines: Iterable[str]) -> str:
    """The one JSON object of --json, or else the lines."""
    return (json.dumps(fields, indent=2, default=bytes.hex) if options.json else "\n".join(lines)) + "\n"


def _lines(fields: dict[str, Any], indent: str = "") -> list[str]:
    """Fields as aligned lines. What came from outside is escaped, so that a file cannot drive a terminal."""
    lines = []
    for name, value in fields.items():
        label = f"{indent}{ascii(name)[1:-1].replace('_', ' '):<{16 - len(indent)}}  "
        if isinstance(value, dict):
            lines += [label.rstrip(), *_lines(value, indent + "  ")] if value else [label + "none"]
        else:
            lines += [label + _shown(item) for item in (value if isinstance(value, list) else [value])]
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_shown(key)} {_shown(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ascii(value)[1:-1] if isinstance(value, str) else show_scalar(value)


def _read(name: str) -> bytes:
    """The bytes of a file ("-": standard input), but no more than the parser needs to see that it is too long."""
    if name == "-":
        return sys.stdin.buffer.read(MAX_FILE + 1)
    try:
        return read_file(name, MAX_FILE)
    except OSError as error:
        wanted = "wanted an evidence file, as `minigpt status --save-evidence` writes it"
        raise OSError(error.errno, f"{error.strerror}; {wanted}", name) from None


def _version() -> str:
    try:
        return metadata.version("minigpt-stages")
    except metadata.PackageNotFoundError:
        return "(run from a checkout that is not installed)"


def _public_key(text: str) -> bytes:
    try:
        return public_key(text)
    except DocumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _hex(size: int, text: str) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != size or not any(data):
        wanted = f"{2 * size} hex digits, not all zero, as `python -m attest measure` prints them"
        raise argparse.ArgumentTypeError(f"got {text[:120]!r}, wanted {wanted}")
    return data


def _number(what: str, least: int, most: int, text: str) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"wanted {what}, {least}..{most}")
    return int(text)


def _time(text: str) -> int:
    if text == "now":
        return int(time.time() * 1000)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None or moment.year < 1971:
        raise argparse.ArgumentTypeError("wanted now, or a time with its zone, such as 2027-01-31T12:00:00Z")
    return int(moment.timestamp() * 1000)
