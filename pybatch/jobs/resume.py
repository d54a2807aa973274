"""Going on with a run of `pybatch bench` that was cut: what of its record stands, and whether it is the same run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pybatch.base.errors import UsageError
from pybatch.fits.noise import INTERRUPTED, MIN_BLOCKS
from pybatch.records import Convergence, Device, Environment, NoiseScale, Note, Run, StepMode, WorkloadInfo

_CONTINUED = "continued on "
_OF_FILE = "SHA-256 of the workload's file"


def check_same(
    earlier: Run, workload: WorkloadInfo, device: Device, environment: Environment, mode: StepMode = "eager"
) -> None:
    """Raise UsageError with every difference that forbids to put the earlier run's figures beside new ones.

    A record cut before anything was measured names no workload or device, and fits to any.
    """
    measured = earlier.capacity
    saved_workload, saved_device = (measured.workload, measured.device) if measured is not None else (None, None)
    there = _of_workload(saved_workload) | _of_device(saved_device) | _of_environment(earlier.environment)
    here = {} if saved_workload is None else _of_workload(workload)
    if saved_workload is not None and measured is not None:
        there, here = there | {"steps": measured.mode}, here | {"steps": mode}
    here |= {} if saved_device is None else _of_device(device)
    here |= {} if earlier.environment is None else _of_environment(environment)
    pairs = {key: (there.get(key, "not set"), here.get(key, "not set")) for key in there | here}
    differences = [f"{key} {saved} there, {now} here" for key, (saved, now) in pairs.items() if saved != now]
    if differences:
        raise UsageError(
            f"--resume: the saved run is another one: {'; '.join(differences)}. "
            "Give the flags of that run, or another output file."
        )


def _of_workload(info: WorkloadInfo | None) -> dict[str, Any]:
    if info is None:
        return {}
    options: dict[str, Any] = {f"option {key}": value for key, value in info.options.items()}
    digest = {} if info.file_sha256 is None else {_OF_FILE: info.file_sha256[:12]}
    names = ("model", "dtype", "parameters", "examples", "optimizer", "learning_rate", "reference_batch")
    options |= {f"optimizer's {key}": value for key, value in info.optimizer_options.items()}
    return digest | options | {"workload": info.name} | {name: getattr(info, name) for name in names}


def _of_device(device: Device | None) -> dict[str, Any]:
    return {} if device is None else {"device": device.name, "UUID": device.uuid, "cores": device.cores}


def _of_environment(environment: Environment | None) -> dict[str, Any]:
    names = ("seed", "pybatch", "torch", "python", "threads", "cuda", "driver")
    return {} if environment is None else {name: getattr(environment, name) for name in names}


def enough(noise: NoiseScale | None) -> bool:
    """Whether a noise scale rests on enough pairs of norms for an interval."""
    return noise is not None and noise.steps >= MIN_BLOCKS


def own(earlier: Run) -> Run:
    """A record without the steps of a sweep that was given beside it: they are not of the run, and given anew."""
    steps = earlier.convergence
    return replace(earlier, convergence=None) if steps is not None and steps.curves else earlier


def standing_noise(earlier: Run) -> NoiseScale | None:
    """The noise scale that need not be measured again."""
    noise = earlier.noise if enough(earlier.noise) else None
    cut = noise is not None and any(note.text.startswith(INTERRUPTED) for note in noise.notes)
    return None if cut else noise


def standing_branches(earlier: Run) -> Convergence | None:
    """The branched runs that need not be made again."""
    steps = earlier.convergence
    return steps if steps is not None and steps.complete else None


def notes(earlier: Run, now: str) -> tuple[Note, ...]:
    """What a continued record says of its past.

    Args:
        earlier: the run that goes on.
        now: ISO 8601 time.
    """
    before = tuple(note for note in earlier.notes if note.text.startswith(_CONTINUED))
    capacity = earlier.capacity
    kept = [str(point.batch) for point in capacity.standing] if capacity is not None else []
    parts = [f"batches {', '.join(kept)}"] if kept else []
    parts += ["the largest batch"] if capacity is not None and capacity.max_batch_verified else []
    parts += ["the noise scale"] if standing_noise(earlier) is not None else []
    parts += ["the branches"] if standing_branches(earlier) is not None else []
    parts += ["steps on several devices"] if earlier.distributed is not None else []
    stands = f"{' and '.join(parts)} of the run begun {earlier.created} stand" if parts else "nothing stands"
    commit = earlier.environment.commit if earlier.environment is not None else None
    there = f" (measured at commit {commit})" if commit is not None else ""
    return (*before, Note("run", f"{_CONTINUED}{now}: {stands}{there}"))
