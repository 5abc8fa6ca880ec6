"""The control groups of this process, cgroups(7), and how much memory it may take."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_SELF = Path("/proc/self")


def folders(controller: str, proc: Path = _SELF) -> Iterator[tuple[Path, bool]]:
    """The folders of its own group and of all above it that can be seen, and whether they are of version 1.

    Nothing where the system has no /proc.
    """
    try:
        lines, mounts = ((proc / name).read_text(errors="surrogateescape") for name in ("cgroup", "mountinfo"))
    except OSError:
        return
    groups = [line.split(":", 2) for line in lines.splitlines() if line.count(":") > 1]
    path = {name: where for _, controllers, where in groups for name in controllers.split(",")}  # version 2 has no name
    for line in mounts.splitlines():
        mounted, _, how = line.partition(" - ")
        root, point = mounted.split(" ")[3:5]
        name = {"cgroup2": "", "cgroup": controller}.get(how.split(" ")[0])
        if name not in path or (name and name not in how.split(" ")[-1].split(",")):
            continue
        below = os.path.relpath(path[name], root)
        top = Path(point)
        own = top if below.startswith("..") else top / below  # the group may lie above what is mounted
        for folder in (own, *own.parents):
            yield folder, bool(name)
            if folder == top:
                break


def memory(proc: Path = _SELF, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that this process may still take: what is free, or its limit, the smallest of what the system says.

    A control group's limit counts whole: what is used of it is mostly files that can be dropped.
    """
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        least = min(least, 1024 * int(lines["MemAvailable"].split()[0]))
    for folder, first_version in folders("memory", proc):
        with contextlib.suppress(OSError, ValueError):  # no limit, written as "max"
            least = min(least, int((folder / ("memory.limit_in_bytes" if first_version else "memory.max")).read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return least if limit == resource.RLIM_INFINITY else min(least, limit)
