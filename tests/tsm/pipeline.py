"""Stages with SNP's or TDX's evidence, and a device process for each: guests pinned under the tests' roots."""

import hashlib
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import domains
import guests
from nitro.pipeline import Enclaves, Rooted

from attest.providers.snp import SnpPins
from attest.providers.tdx import TdxPins

HERE = Path(__file__).resolve().parent


def pins(kind: str, index: int, **more: Any) -> Rooted:
    """What the guest of stage `index` measures to; with `more` pins."""
    measurement = (bytes([100 + index]) * 48).hex()
    common = {"provider": kind, "covers": "image"}
    if kind == "snp":
        fields = {"product": "Milan", "measurements": [measurement], "policy": 0x30000, "min_tcb": guests.VERSIONS}
        return Rooted(SnpPins(common | fields | more), guests.root(guests.living()))
    names = ("rtmr0", "rtmr1", "rtmr2", "rtmr3", "td_attributes", "xfam")
    registers = {"mrtd": measurement} | {name: domains.BODY[name].hex() for name in names}
    root = hashlib.sha256(domains.living()["root"].der).digest()
    return Rooted(TdxPins(common | registers | {"min_tcb_evaluation": 17} | more), root)


class Guests(Enclaves):
    """As `Enclaves`, of one kind: "snp" or "tdx". What `endorsements` holds is given to a TDX stage."""

    scripts = HERE

    def __init__(self, folder: Path, split: str, where: Path, kind: str, **changes: Any) -> None:
        self.kind = kind
        count = len(split.split("+"))
        super().__init__(folder, split, where, **{"pins": [pins(kind, index) for index in range(count)]} | changes)
        self.endorsements = where / "endorsements"
        self.endorsements.mkdir()
        for name, data in (snp_files() if kind == "snp" else tdx_files()).items():
            (self.endorsements / name).write_bytes(data)

    def usual(self, index: int) -> tuple[str, ...]:
        return "--kind", self.kind, "--measurement", str(100 + index)

    def spawn(self, index: int, *flags: str, **more: Any) -> "subprocess.Popen[str]":
        endorsed = more.pop("endorsed", self.manifest.stages[index].platform.name == "tdx")
        given = ("--endorsements", str(self.endorsements)) if endorsed else ()
        return super().spawn(index, *given, *flags, **more)


def snp_files() -> dict[str, bytes]:
    """What AMD has of the tests' chip."""
    return dict(zip(("vcek", "ask", "ark"), guests.living(), strict=True))


def tdx_files(ends: datetime = domains.EVER["ends"]) -> dict[str, bytes]:
    """What Intel has of the tests' platform, as its service answers."""
    return domains.files(domains.living(), domains.living_collateral(ends=ends))
