"""What an AMD SEV-SNP machine will report when it boots an image: the launch digest.

    python scripts/image/measure_snp.py stage-0.eif --ovmf OVMF.fd --vcpus 2 --vcpu-type EPYC-Milan

The digest is over the firmware, over the kernel, ramdisks and command line of the image (which the firmware checks: so
it must be OVMF's AmdSev build, with kernel-hashes=on in qemu), and over the first state of every virtual processor. So
their number and type belong to what is measured, and to what is printed. The package sev-snp-measure (extra `snp`)
computes it; the image's parts are handed to it as qemu gets them.
"""

import argparse
import hashlib
import importlib
import json
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whatever is installed

from scripts.image import eif

SNP_ACTIVE = 1  # the one bit of SEV_FEATURES that qemu sets by default


class SnpError(Exception):
    """The digest cannot be computed; the message says why."""


def launch_digest(image: eif.Image, ovmf: Path, vcpus: int, vcpu_type: str, features: int = SNP_ACTIVE) -> bytes:
    """The launch digest, 48 bytes.

    Args:
        ovmf: the firmware, an AmdSev build of OVMF.
        vcpus: how many virtual processors the guest gets.
        vcpu_type: of which type, as qemu's -cpu names it.
        features: SEV_FEATURES of the guest.

    Raises:
        SnpError: the package is missing, the type unknown, or the firmware unfit.
    """
    try:
        guest, modes, types = (
            importlib.import_module(f"sevsnpmeasure.{name}") for name in ("guest", "sev_mode", "vcpu_types")
        )
    except ImportError as error:
        raise SnpError(f"{error}: install sev-snp-measure, as the extra snp does") from None
    if vcpu_type not in types.CPU_SIGS:
        raise SnpError(f"virtual processor type {vcpu_type!r}: wanted one of {', '.join(types.CPU_SIGS)}")
    if vcpus < 1:
        raise SnpError(f"{vcpus} virtual processors, wanted at least 1")
    with tempfile.TemporaryDirectory() as folder:
        eif.extract(image, Path(folder))
        kernel, initrd = (str(Path(folder, name)) for name in ("kernel", "initrd"))
        append = image.cmdline.decode("ascii")
        arguments = (vcpus, types.CPU_SIGS[vcpu_type], str(ovmf), kernel, initrd, append, features)
        try:
            digest: bytes = guest.calc_launch_digest(modes.SevMode.SEV_SNP, *arguments)
        except (RuntimeError, ValueError, KeyError, IndexError, AssertionError, struct.error) as error:
            raise SnpError(f"{ovmf}: not a firmware that measures a kernel: {error or type(error).__name__}; "
                           "wanted OVMF built from OvmfPkg/AmdSev/AmdSevX64.dsc") from None  # fmt: skip
    return digest


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The digest, and everything it depends on."""
    image = eif.read_file(options.image)
    digest = launch_digest(image, options.ovmf, options.vcpus, options.vcpu_type, options.features)
    return {
        "launch_digest": digest.hex(),
        "vcpus": options.vcpus,
        "vcpu_type": options.vcpu_type,
        "guest_features": options.features,
        "ovmf_sha256": hashlib.sha256(options.ovmf.read_bytes()).hexdigest(),
        "command_line": image.cmdline.decode("ascii"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = argparse.ArgumentParser(prog="measure_snp.py", description="Computes an image's SEV-SNP launch digest.")
    options.add_argument("image", type=Path, metavar="IMAGE", help="of the plain layout")
    options.add_argument("--ovmf", type=Path, required=True, metavar="FILE", help="an AmdSev build of OVMF")
    options.add_argument("--vcpus", type=int, required=True, metavar="N", help="virtual processors of the guest")
    options.add_argument("--vcpu-type", required=True, metavar="TYPE", help="as qemu's -cpu names it, EPYC-Milan say")
    options.add_argument("--features", type=lambda text: int(text, 0), default=SNP_ACTIVE, metavar="BITS",
                         help=f"SEV_FEATURES of the guest (default: {SNP_ACTIVE})")  # fmt: skip
    try:
        print(json.dumps(describe(options.parse_args(argv)), indent=2))
    except (SnpError, eif.EifError) as error:
        print(f"measure_snp.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"measure_snp.py: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
