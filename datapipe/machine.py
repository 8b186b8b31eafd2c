"""What a run needs of the machine that it starts on, looked at within milliseconds: memory, open files, disks, and a
folder that can be written."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datapipe.shards import Store
from subject_diffusion.errors import RunError
from subject_diffusion.storage import file_system, is_local

GB = 1e9
LOW_MEMORY_GB = 2.0
"""A worker with the toy models takes about 1 GB."""
OPEN_FILES = 8192
"""What Ray recommends. It raises the soft limit to the hard one by itself."""
LOW_DISK_GB, NO_DISK_GB = 5.0, 0.2
"""Below the first, a run over some ten thousand images does not fit; below the second, hardly any does."""
FULL_FOR_RAY = 0.95
"""Ray stores no object while more of its disk is used (its `local_fs_capacity_threshold`)."""


@dataclass(frozen=True)
class Check:
    """What was found, and unless it is ok, what to do about it."""

    level: Literal["ok", "warn", "FAIL"]
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.text}"


def check_machine() -> Iterator[Check]:
    """All of it that costs no time."""
    yield judge_memory(_free_memory())
    yield judge_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield _disk(Path(tempfile.gettempdir()), rays=True)


def check_out(out: str) -> Iterator[Check]:
    """Whether a run can write into a folder, which need not be there yet, and its disk has room."""
    scratch = Path(tempfile.gettempdir())
    try:
        if (place := _place_of(out)) is not None and place.stat().st_dev != scratch.stat().st_dev:
            yield _disk(place, rays=False)
        Store(str(place) if place is not None and place.is_dir() else out).check_writable()
    except RunError as error:
        yield Check("FAIL", str(error))
    else:
        yield Check("ok", f"{out} can be written")


def judge_memory(free: float) -> Check:
    """`free`: bytes."""
    there = f"{free / GB:,.1f} GB of memory free"
    if free < LOW_MEMORY_GB * GB:
        return Check("warn", f"{there}, and a worker takes 1 GB and its models; end other programs, or lower run.pools")
    return Check("ok", there)


def judge_open_files(most: int) -> Check:
    """`most`: the hard limit."""
    if most != resource.RLIM_INFINITY and most < OPEN_FILES:
        return Check("warn", f"at most {most:,} open files, and Ray wants {OPEN_FILES:,}; have `ulimit -Hn` raised")
    return Check("ok", "any number of open files" if most == resource.RLIM_INFINITY else f"{most:,} open files")


def judge_disk(place: Path, free: int, total: int, rays: bool) -> Check:
    """`free`, `total`: bytes of the disk that the place is on; `rays`: whether Ray writes there, too."""
    if not total:
        return Check("ok", f"{place} is on a file system that does not tell its size")
    there = f"{free / GB:,.1f} GB of {total / GB:,.0f} GB free at {place}"
    if free < NO_DISK_GB * GB:
        return Check("FAIL", f"{there}, too little for any run; free some, or name a place on another disk")
    if rays and free < (1 - FULL_FOR_RAY) * total:
        return Check("warn", f"{there}, and Ray stores nothing on a disk that is {FULL_FOR_RAY:.0%} full; free some")
    if free < LOW_DISK_GB * GB:
        return Check("warn", f"{there}; free some, or name a place on another disk")
    return Check("ok", there)


def _disk(place: Path, rays: bool) -> Check:
    usage = shutil.disk_usage(place)
    return judge_disk(place, usage.free, usage.total, rays)


def _free_memory() -> int:
    """Bytes that can be had, within the container's limit if there is one; where that is not told, of all memory."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.exists():  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = 1024 * _numbers(meminfo)["MemAvailable:"]
    limit = group / "memory.max"
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return free
    used = int((group / "memory.current").read_text()) - _numbers(group / "memory.stat")["inactive_file"]
    return min(free, int(most) - used)


def _numbers(path: Path) -> dict[str, int]:
    """The lines `name number` of a file of the kernel's."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if (words := line.split())}


def _place_of(out: str) -> Path | None:
    """The folder, or the nearest one around it that is there; None for a bucket. Raises RunError."""
    files, path = file_system(out, RunError)
    if not is_local(files):
        return None
    return next(place for place in (Path(path), *Path(path).parents) if os.path.exists(place))
