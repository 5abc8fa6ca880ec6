"""A driver for the kernel of an image, in place of SEV-SNP's: it gives reports through the kernel's own configfs-tsm.

A report is a given one, with what it is about put into it. So it is not signed, and nobody accepts it.
"""

import subprocess
from pathlib import Path

from scripts.image import packages

AT = 0x50  # of report_data in a report
SOURCE = """
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/tsm.h>

static const u8 report[] = { %s };
static const u8 table[] = { %s };

static int report_new(struct tsm_report *made, void *data)
{
    if (made->desc.inblob_len != 64)
        return -EINVAL;
    made->outblob = kvmemdup(report, sizeof(report), GFP_KERNEL);
    made->auxblob = kvmemdup(table, sizeof(table), GFP_KERNEL);
    if (!made->outblob || !made->auxblob)
        return -ENOMEM;
    made->outblob_len = sizeof(report);
    made->auxblob_len = sizeof(table);
    memcpy(made->outblob + %d, made->desc.inblob, 64);
    return 0;
}

static bool shown(int attribute) { return true; }

static const struct tsm_ops ops = {
    .name = "sev_guest", .report_new = report_new, .report_attr_visible = shown, .report_bin_attr_visible = shown,
};

static int __init start(void) { return tsm_register(&ops, NULL); }

module_init(start);
MODULE_LICENSE("GPL");
"""


class NoDriver(Exception):
    """It cannot be built here."""


def build(kernel: packages.Package, where: Path, report: bytes, table: bytes) -> bytes:
    """The module for a kernel of Debian's, built in an empty folder. Raises NoDriver."""
    release = kernel.name.removeprefix("linux-image-")
    version, _, kind = release.partition("+")
    family = f"{version}+{kind.partition('-')[0]}"
    names = (f"linux-headers-{release}", f"linux-headers-{family}-common", f"linux-kbuild-{family}")
    source = where / "driver"
    source.mkdir()
    _run(["apt-get", "download", *(f"{name}={kernel.version}" for name in names)], where)
    for package in where.glob("*.deb"):
        packages.unpack(package, where)
    headers = where / "usr/src" / names[0]
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", "../"))
    (source / "Makefile").write_text("obj-m := driver.o\n")
    (source / "driver.c").write_text(SOURCE % (*(", ".join(map(str, data)) for data in (report, table)), AT))
    _run(["make", "-C", str(headers), f"M={source}", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"], where)
    return (source / "driver.ko").read_bytes()


def _run(command: list[str], where: Path) -> None:
    try:
        done = subprocess.run(command, cwd=where, check=False, capture_output=True, text=True)
    except OSError as error:
        raise NoDriver(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise NoDriver(f"{command[0]}: {done.stderr[-300:]}")
