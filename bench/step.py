"""Optimizer steps against torch's chains and other fused optimizers; accumulation and noise statistics.

    python bench/step.py [--device cpu|cuda] [--repeats N] [--optimizers AdamW,LAMB] [--precisions fp32,bf16]
                         [--chains update,clip,scaler,noise,accumulate] [--shapes "GPT-2 124M"] [--output FILE]

Validated on the same inputs before anything is timed. Random data, last-level cache flushed before every sample, all
sides interleaved in one process. A ratio is of medians; its interval is from resampling the pairs. On a GPU, times are
of a lone step, host and device, and beside them of the device alone with the host ahead, as behind a backward pass;
bytes per second and ceilings are of the latter. Results are written after each case. Without filters the cases are
those named in `selection`. The table goes to stdout; results to bench/results/<device>.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accumulation import Accumulate, NoisyStep
from peers import BETAS, DECAY, LAMB_EPS, LION_BETAS, LR, MOMENTUM, TRUST, Params, Peer, peers
from shapes import SHAPES, Shapes
from tensors import gradients, parameters, share
from timing import Clock, DeviceClock, ceilings, interleave, ratio

from pybatch import ops, optim
from pybatch.device.identity import describe
from pybatch.records import Device

OPTIMIZERS = ("AdamW", "SGD", "Adam", "Lion", "LARS", "LAMB", "Muon")  # a run that is cut short has the first
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # bf16: parameters and gradients, with fp32 masters
CHAINS = ("update", "clip", "scaler", "noise", "accumulate")
VALIDATION_STEPS = 3
SCALE = 1024.0  # of the loss, where there is a GradScaler
TWIN = "ours in Triton"  # timed beside ours on a GPU, but no witness that ours is right

# Bytes read + written per element by our update alone: parameter 8, gradient 4, 8 for every state. With masters the
# parameter is written (2), the master read and written (8), the gradient 2. LARS reads the gradient once more for its
# norm; LAMB reads it, both states and the parameter once more. Muon: without the matrix products between its passes.
STATES = {"SGD": 1, "Adam": 2, "AdamW": 2, "Lion": 1, "LARS": 1, "LAMB": 2}


def our_bytes(name: str, precision: str, chain: str) -> int:
    """The byte model of one step of ours."""
    value, grad = (8, 4) if precision == "fp32" else (2 + 8, 2)
    read = 4  # a parameter's truth
    if name == "Muon":
        total = (grad + 8 + 2) + (value + 2)
    else:
        total = value + grad + 8 * STATES[name]
        total += {"LARS": grad, "LAMB": read + 8}.get(name, 0)  # LAMB's second pass needs no gradient
    if chain != "update" and name != "LARS":
        total += grad
    if chain == "scaler":
        total += 2 * grad  # GradScaler's own search for infinities, which reads and writes
        total += grad  # left unscaled
    return total


class Case(Protocol):
    """What is timed: sides by name, "ours" first, over the same inputs."""

    optimizer: str
    precision: str
    chain: str
    ours_bytes: int
    tolerance: float

    @property
    def sides(self) -> Mapping[str, Callable[[], object]]:
        """Runs by name."""

    def prepare(self, seed: int | None) -> None:
        """Inputs of the next run: fresh ones of a seed, or the last ones again."""

    def errors(self) -> dict[str, float]:
        """Deviation of ours from each other side, after some runs."""


class Side:
    """One optimizer at the end of its chain, with parameters of its own; `clip`: torch clips before it."""

    def __init__(self, params: Params, optimizer: Any, masters: Params | None, clip: bool, scaler: bool) -> None:
        self.params, self.optimizer, self.masters, self.clip = params, optimizer, masters, clip
        self.grads, self.master_grads = _give_memory(params), _give_memory(masters or [])
        device = params[0].device
        self.scaler = torch.amp.GradScaler(device.type, init_scale=SCALE) if scaler else None
        if self.scaler is not None:
            self.scaler.scale(torch.ones((), device=device))  # which makes the scale

    def give(self, grads: list[torch.Tensor]) -> None:
        torch._foreach_copy_(self.grads, grads)

    @torch.no_grad()
    def __call__(self) -> None:
        updated = self.params if self.masters is None else self.masters
        if self.masters is not None:  # the user's casts
            torch._foreach_copy_(self.master_grads, self.grads)
        if self.scaler is not None and self.clip:
            self.scaler.unscale_(self.optimizer)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(updated, 1.0, foreach=True)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.masters is not None:
            torch._foreach_copy_(list[torch.Tensor](self.params), list[torch.Tensor](self.masters))


def _give_memory(params: Params) -> list[torch.Tensor]:
    """Gradients that stay where they are."""
    grads = [torch.zeros_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return grads


def ours(name: str, params: Params, chain: str, precision: str, backend: str | None = None) -> Any:
    """Our optimizer with the setting of the peers."""
    own: dict[str, dict[str, Any]] = {
        "SGD": {"momentum": MOMENTUM},
        "Adam": {"betas": BETAS},
        "AdamW": {"betas": BETAS},
        "Lion": {"betas": LION_BETAS},
        "LARS": {"momentum": MOMENTUM, "trust_coefficient": TRUST, "skip": False},
        "LAMB": {"betas": BETAS, "eps": LAMB_EPS, "skip": False},
        "Muon": {},
    }
    return getattr(optim, name)(
        params,
        lr=LR,
        weight_decay=DECAY[name],
        **own[name],
        max_grad_norm=None if chain == "update" else 1.0,
        master_weights=precision != "fp32",
        backend=backend,
    )


class Update:
    """A step at the end of a chain: "update" alone, "clip" before it, or "scaler": unscale and search infinities."""

    def __init__(self, name: str, precision: str, chain: str, shapes: Shapes, device: torch.device) -> None:
        self.optimizer, self.precision, self.chain = name, precision, chain
        self.ours_bytes = our_bytes(name, precision, chain)
        # torch's fp32 norm of one tensor of 32 M is off by 2e-3; bf16 rounds what lies between two of its values.
        self.tolerance = 0.05 if precision != "fp32" or name == "Muon" else 5e-3
        self.shapes, self.device, self.dtype = shapes, device, PRECISIONS[precision]
        params = parameters(shapes, device, self.dtype)
        others, self.missing = peers(name, device)
        made = {"ours": Side(params, ours(name, params, chain, precision), None, False, chain == "scaler")}
        if device.type == "cuda" and chain == "clip":  # beside CUDA C++; where there is none, ours is Triton
            twin = parameters(shapes, device, self.dtype)
            made[TWIN] = Side(twin, ours(name, twin, chain, precision, "triton"), None, False, False)
        for peer, kind in others.items():
            try:
                made[peer] = self._side(kind)
            except Exception as error:  # of another package, another version
                self.missing[peer] = f"not timed: {type(error).__name__}: {error}"
        self.sides = made

    def _side(self, peer: Peer) -> Side:
        params, masters = parameters(self.shapes, self.device, self.dtype), None
        if self.dtype != torch.float32 and not peer.own_master:
            masters = [torch.nn.Parameter(p.detach().float()) for p in params]
        optimizer = peer.make(params if masters is None else masters)
        return Side(params, optimizer, masters, self.chain != "update", self.chain == "scaler")

    def prepare(self, seed: int | None) -> None:
        if seed is not None:
            scale = SCALE if self.chain == "scaler" else 1.0
            self.grads = gradients(self.sides["ours"].params, seed, scale)
        for side in self.sides.values():
            side.give(self.grads)

    def errors(self) -> dict[str, float]:
        start = parameters(self.shapes, self.device, self.dtype)
        mine = self.sides["ours"].params
        return {name: share(mine, side.params, start) for name, side in self.sides.items() if name != "ours"}


def measure(case: Case, label: str, clock: Clock, repeats: int) -> dict[str, Any]:
    """Validate, then time. A peer that fails or gives something else is reported and not timed."""
    failed: dict[str, str] = {}
    for seed in range(VALIDATION_STEPS):
        case.prepare(seed)
        for name, run in case.sides.items():
            try:
                run()
            except Exception as error:
                if name == "ours":
                    raise
                failed[name] = f"not timed: {type(error).__name__}: {error}"
    errors = {name: value for name, value in case.errors().items() if name not in failed}
    agree = {name for name, value in errors.items() if value < case.tolerance}
    what = f"{case.optimizer}, {case.precision}, {case.chain}, {label}"
    if not agree - {TWIN}:
        raise SystemExit(f"{what}: no peer agrees with ours, nothing is timed. Deviations over movement: {errors}")
    sides = {name: run for name, run in case.sides.items() if name == "ours" or name in agree}
    times = interleave(sides, lambda: case.prepare(None), clock, repeats)
    device_s: dict[str, float] = {}
    if clock.device.type == "cuda":
        hold_s = min(0.1, max(2e-3, 2 * max(map(statistics.median, times.values()))))
        on_device = interleave(sides, lambda: case.prepare(None), DeviceClock(clock.device, hold_s), repeats)
        device_s = {name: statistics.median(values) for name, values in on_device.items()}
    elements = sum(math.prod(shape) for shape in SHAPES[label])
    ours_s = statistics.median(times["ours"])
    row: dict[str, Any] = {
        "optimizer": case.optimizer,
        "precision": case.precision,
        "chain": case.chain,
        "shapes": label,
        "elements": elements,
        "repeats": repeats,
        "ours_ms": 1e3 * ours_s,
        "ours_quartiles_ms": _quartiles(times["ours"]),
        "ours_bytes_per_element": case.ours_bytes,
        "ours_device_ms": 1e3 * device_s["ours"] if device_s else None,
        "ours_bytes_per_s": elements * case.ours_bytes / device_s.get("ours", ours_s),
        "peers": {},
        "missing": getattr(case, "missing", {}) | failed,
    }
    for name, deviation in errors.items():
        if name not in agree:
            row["missing"][name] = f"not timed: deviates by {deviation:.1e} of the movement"
            continue
        middle, low, high = ratio(times["ours"], times[name])
        row["peers"][name] = {
            "ms": 1e3 * statistics.median(times[name]),
            "device_ms": 1e3 * device_s[name] if device_s else None,
            "quartiles_ms": _quartiles(times[name]),
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
            "deviation_over_movement": deviation,
        }
    return row


def _quartiles(seconds: list[float]) -> list[float]:
    quarters = statistics.quantiles(seconds, n=4)
    return [1e3 * quarters[0], 1e3 * quarters[2]]


def makers(name: str, precision: str, chain: str) -> Callable[[Shapes, torch.device], Case] | None:
    """What makes this case; None where there is none."""
    if chain in ("noise", "accumulate"):
        special: Callable[[Shapes, torch.device], Case] = NoisyStep if chain == "noise" else Accumulate
        return special if (name, precision) == ("AdamW", "fp32") else None
    if chain == "scaler" and (precision != "fp32" or name not in ("SGD", "Adam", "AdamW")):
        return None  # a GradScaler needs a torch optimizer, and has fp32 parameters
    return lambda shapes, device: Update(name, precision, chain, shapes, device)


def selection(name: str, precision: str, chain: str, label: str, device: torch.device) -> bool:
    """The cases of a run without filters: all chains and shapes of AdamW, the others with clipping."""
    if label == "1000 tensors of 100x100" and device.type != "cuda":
        return False  # the target for many tensors is of 10 M elements on a GPU
    if name == "AdamW":
        return precision == "fp32" or chain == "clip"
    if chain != "clip":
        return False
    if name == "Muon":  # its matrix products take seconds on a CPU
        return label != "one tensor of 32 M" and (label != "GPT-2 124M" or device.type == "cuda")
    return label in ("one tensor of 32 M", "1000 tensors of 64x64")


def chosen(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, str, str, str]]:
    """Optimizer, precision, chain and shapes of every case to run."""
    filters = (arguments.optimizers, arguments.precisions, arguments.chains, arguments.shapes)
    for name in arguments.optimizers or OPTIMIZERS:
        for precision in arguments.precisions or PRECISIONS:
            for chain in arguments.chains or CHAINS:
                for label in arguments.shapes or SHAPES:
                    if makers(name, precision, chain) is not None and (
                        any(filters) or selection(name, precision, chain, label, device)
                    ):
                        yield name, precision, chain, label


def listed(known: Collection[str]) -> Callable[[str], list[str]]:
    """Reader of a comma-separated choice."""

    def read(text: str) -> list[str]:
        given = text.split(",")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known. Use: {', '.join(known)}")
        return given

    return read


def main() -> int:
    """Measure, print and write each case as it is done; exit status 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--optimizers", type=listed(OPTIMIZERS))
    parser.add_argument("--precisions", type=listed(PRECISIONS))
    parser.add_argument("--chains", type=listed(CHAINS))
    parser.add_argument("--shapes", type=listed(SHAPES))
    parser.add_argument("--output", type=Path, help="default: bench/results/<device>.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    identity, clock = describe(device), Clock(device)
    roof = ceilings(DeviceClock(device) if device.type == "cuda" else clock, max(5, arguments.repeats // 3))
    print(f"ceilings: copy {roof['copy'] / 1e9:.1f} GB/s, in place {roof['in_place'] / 1e9:.1f} GB/s", flush=True)
    output = arguments.output or Path(__file__).parent / "results" / f"{slug(identity)}.json"
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    record = {
        "script": "bench/step.py",
        "device": identity.name,
        "kind": arguments.device,
        "threads": torch.get_num_threads(),
        "vector_width": ops.build().cpu_width,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "ceilings_bytes_per_s": roof,
        "results": rows,
        "failed": failed,
    }
    for name, precision, chain, label in chosen(arguments, device):
        make = makers(name, precision, chain)
        assert make is not None
        try:
            row = measure(make(SHAPES[label], device), label, clock, arguments.repeats)
        except (Exception, SystemExit) as error:  # the other cases still count
            what = f"{name}, {precision}, {chain}, {label}"
            failed[what] = f"{type(error).__name__}: {error}"
            print(f"{what} FAILED\n{traceback.format_exc(limit=-4)}", flush=True)
        else:
            rows.append(row)
            print(line(row, max(roof.values())), flush=True)
        output.write_text(json.dumps(record, indent=2) + "\n")  # after each: the run may be cut short
    return int(bool(failed))


def slug(identity: Device) -> str:
    """A device's name as a file name: amd-epyc-2-cores."""
    cores = f" {identity.cores} cores" if identity.cores else ""
    return re.sub("[^a-z0-9]+", "-", (identity.name + cores).lower()).strip("-")


def line(row: dict[str, Any], roof: float) -> str:
    """One case in one line of the table, one more for every peer that could not be timed for a reason of its own."""

    def alone(device_ms: float | None) -> str:
        return "" if device_ms is None else f" ({device_ms:.3f} on the device)"

    against = "  ".join(
        f"{name} {peer['ms']:.2f} ms{alone(peer['device_ms'])} {peer['ratio']:.2f}x "
        f"[{peer['ratio_low']:.2f}, {peer['ratio_high']:.2f}]"
        for name, peer in row["peers"].items()
    )
    notes = "".join(f"\n    {name}: {why}" for name, why in row["missing"].items() if why.startswith("not timed"))
    return (
        f"{row['optimizer']:6}{row['precision']:5}{row['chain']:46}{row['shapes']:23}{row['ours_ms']:8.2f} ms"
        f"{alone(row['ours_device_ms'])} "
        f"{row['ours_bytes_per_s'] / 1e9:6.1f} GB/s of the byte model, {row['ours_bytes_per_s'] / roof:4.0%} of the "
        f"ceiling | {against}{notes}"
    )


if __name__ == "__main__":
    sys.exit(main())
