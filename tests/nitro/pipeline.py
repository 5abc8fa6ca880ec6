"""Stages with Nitro's evidence, and a device process for each: enclaves pinned under the tests' root."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import enclaves
from processes import Stages, eventually

from attest import providers
from attest.providers.nitro import NitroPins

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Rooted(providers.Rooted):
    """Pins of a stage, with a root of the tests' in place of the vendor's."""

    root: bytes = enclaves.ROOT


def image(index: int) -> NitroPins:
    """What the image of stage `index` measures to: PCR2 is its own."""
    return NitroPins({0: enclaves.PCRS[0], 1: enclaves.PCRS[1], 2: bytes([100 + index]) * 48})


class Enclaves(Stages):
    """As `Stages`. A device answers each of them; it can be replaced by another while its stage serves."""

    scripts = HERE  # where device.py and stage.py are

    def __init__(self, folder: Path, split: str, where: Path, **changes: Any) -> None:
        count = len(split.split("+"))
        super().__init__(folder, split, where, **{"pins": [Rooted(image(index)) for index in range(count)]} | changes)
        self._devices: dict[int, subprocess.Popen[str]] = {}
        self._answers: dict[int, Path] = {}

    def device(self, index: int, *flags: str) -> None:
        """Starts the device of a stage, in place of the one it has. `flags` as in device.py."""
        self._end_device(index)
        place = self.place(index)
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        self._answers[index] = self.where / f"answers-{index}"
        command = [sys.executable, self.scripts / "device.py", place, *self.usual(index), *flags]
        with self._answers[index].open("w") as said:
            self._devices[index] = subprocess.Popen(list(map(str, command)), stdout=said, text=True)
        assert eventually(lambda: self._answers[index].read_text().startswith("ready"))

    def place(self, index: int) -> Path:
        """Where the device of a stage is."""
        return self.where / f"device-{index}"

    def usual(self, index: int) -> tuple[str, ...]:
        """What its device is told, so that a stage is as pinned."""
        return "--pcr", f"2={100 + index}"

    def answers(self, index: int) -> int:
        """How often the device of a stage has answered."""
        return self._answers[index].read_text().count("answered")

    def spawn(self, index: int, *flags: str, **more: Any) -> "subprocess.Popen[str]":
        if index not in self._devices:
            self.device(index)
        python = (str(self.scripts / "stage.py"), str(self.place(index)))
        more = {"python": python} | {name: value for name, value in more.items() if name != "python"}
        return super().spawn(index, *more.pop("switches", ["--allow-test-root"]), *flags, **more)

    def _end_device(self, index: int) -> None:
        device = self._devices.pop(index, None)
        if device is not None:
            device.kill()
            device.wait()

    def close(self) -> None:
        super().close()
        for index in list(self._devices):
            self._end_device(index)
