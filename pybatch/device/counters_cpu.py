"""A CPU's counters: time of this process and of others (psutil), energy of the packages (RAPL)."""

from __future__ import annotations

from pathlib import Path

import psutil

from pybatch.device.identity import usable_cores

RAPL_FOLDER = Path("/sys/class/powercap")


class CpuTime:
    """Share of the usable cores that this process kept busy."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._cores = usable_cores()
        self._process = psutil.Process()

    def start(self) -> None:
        """Begin a region."""
        self._before = self._seconds()

    def stop(self, seconds: float) -> dict[str, float]:
        """`cpu_active` over the region."""
        busy = self._seconds() - self._before
        return {"cpu_active": min(1.0, busy / (seconds * self._cores))} if seconds > 0 else {}

    def _seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


class Rapl:
    """Energy of the CPU packages."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._domains = sorted(RAPL_FOLDER.glob("intel-rapl:?/energy_uj")) if RAPL_FOLDER.is_dir() else []
        if not self._domains:
            self.reasons["joules"] = "no RAPL energy counter under /sys/class/powercap"
        self._joules()

    def start(self) -> None:
        """Begin a region."""
        self._before = self._joules()

    def stop(self, seconds: float) -> dict[str, float]:
        """`joules` over the region; left out where the counter wrapped around."""
        after = self._joules()
        if self._before is None or after is None or after < self._before:
            return {}
        return {"joules": after - self._before}

    def _joules(self) -> float | None:
        if self.reasons:
            return None
        try:
            return sum(int(path.read_text()) for path in self._domains) / 1e6
        except (OSError, ValueError) as error:
            self.reasons["joules"] = f"the RAPL energy counter cannot be read: {error}"
            return None
