"""A guest's configfs-tsm as a process of its own: FIFOs in a folder, and what it says is signed under the tests' roots.

    python tests/tsm/device.py FOLDER --kind snp|tdx [--measurement BYTE] [--debug] [--foreign] [--bare] [--twice]
        [--delay S] [--silent]

Each answer is a line on standard output.
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import domains
import guests
from cryptography.hazmat.primitives.asymmetric import ec


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("folder", type=Path)
    made.add_argument("--kind", choices=("snp", "tdx"), required=True)
    made.add_argument("--measurement", type=int, default=7, help="a byte, 48 times")
    made.add_argument("--debug", action="store_true", help="a guest that its host may look into")
    made.add_argument("--foreign", action="store_true", help="another root, with the same names")
    made.add_argument("--bare", action="store_true", help="no certificates come with SNP's reports")
    made.add_argument("--twice", action="store_true", help="every answer but the first is the one before it")
    made.add_argument("--delay", type=float, default=0.0, help="seconds that an answer takes")
    made.add_argument("--silent", action="store_true", help="answers nothing")
    return made


def snp(chosen: argparse.Namespace) -> Callable[[bytes], bytes]:
    fields: dict[str, Any] = {
        "measurement": bytes([chosen.measurement]) * 48,
        "policy": 0xB0000 if chosen.debug else 0x30000,
    }
    return lambda data: guests.report(report_data=data, **fields)


def tdx(chosen: argparse.Namespace) -> Callable[[bytes], bytes]:
    made = domains.living(ec.derive_private_key(7, ec.SECP256R1()) if chosen.foreign else None)
    attributes = bytes([chosen.debug]) + domains.BODY["td_attributes"][1:]
    fields: dict[str, Any] = {"mrtd": bytes([chosen.measurement]) * 48, "td_attributes": attributes}
    return lambda data: domains.quote(made, report_data=data, **fields)


def main() -> None:
    chosen = options().parse_args()
    make = (snp if chosen.kind == "snp" else tdx)(chosen)
    given: list[bytes] = []

    def answer(data: bytes) -> bytes:
        if chosen.silent:
            threading.Event().wait()
        time.sleep(chosen.delay)
        print("answered", flush=True)
        if not (given and chosen.twice):
            given[:] = [make(data)]
        return given[0]

    chain = guests.living(guests.rsa_key(2) if chosen.foreign else None)
    folder = guests.Folder(chosen.folder, b"" if chosen.bare else guests.full_table(chain), answer,
                           provider="sev_guest" if chosen.kind == "snp" else "tdx_guest")  # fmt: skip
    print("ready", flush=True)
    folder.thread.join()


if __name__ == "__main__":
    main()
