"""One of two processes that train the same model sharded; started by tests/optim/test_dtensor.py.

python dtensor_worker.py RANK RENDEZVOUS_FILE OUTPUT
"""

import gc
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from pybatch import optim
from pybatch.base.errors import UsageError

KINDS = {
    "sgd": (optim.SGD, {"momentum": 0.9}),
    "adamw": (optim.AdamW, {}),
    "lamb": (optim.LAMB, {"weight_decay": 0.1}),
    "lars": (optim.LARS, {"trust_coefficient": 0.1, "weight_decay": 0.1}),
    "muon": (optim.Muon, {}),
}
STEPS, COUNTS = 3, (3, 5)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def data(step, n):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(100 * step + n))


def gradients(step, n):
    """What every process computes alike, from the plain model's shapes."""
    generator = torch.Generator().manual_seed(100 * step + n)
    return [torch.randn(p.shape, generator=generator) for p in model().parameters()]


def place(params, mesh, placements):
    """DTensor parameters; None leaves one plain."""
    made = []
    for param, placement in zip(params, placements, strict=True):
        value = param.detach() if placement is None else distribute_tensor(param.detach(), mesh, placement)
        made.append(torch.nn.Parameter(value))
    return made


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(kind, params, *, accumulate, steps=range(STEPS), opt=None, **more):
    """The same gradients for whatever placement; returns the optimizer."""
    maker, options = KINDS[kind]
    opt = opt or maker(params, lr=0.05, max_grad_norm=1.0, noise=accumulate, **options, **more)
    for step in steps:
        for n in COUNTS if accumulate else COUNTS[:1]:
            for param, grad in zip(params, gradients(step, n), strict=True):
                if isinstance(param, DTensor):
                    grad = distribute_tensor(grad, param.device_mesh, param.placements)
                param.grad = grad
            if accumulate:
                opt.accumulate(n)
        opt.step()
    return opt


def outcome(opt, params):
    found = {"params": [whole(p) for p in params], "norm": float(opt.grad_norm)}
    if opt._options.noise:
        noise = opt.noise
        found["noise"] = (noise.steps, noise.grad_sq, noise.trace)
        found["layers"] = [(layer.grad_sq, layer.trace) for layer in noise.layers]
    return found


def placed(mesh, plane):
    return {
        "sharded": (mesh, [[Shard(0)]] * 4),
        "replicated": (mesh, [[Replicate()]] * 4),
        "mixed": (mesh, [[Shard(1)], [Replicate()], [Shard(0)], None]),
        "plane": (plane, [[Replicate(), Shard(0)], [Replicate(), Replicate()], [Shard(0), Shard(1)], None]),
    }


def fully_sharded(kind, **more):
    net = model()
    for layer in (net[0], net[2], net):
        fully_shard(layer)
    maker, options = KINDS[kind]
    opt = maker(net.parameters(), lr=0.05, max_grad_norm=0.1, **options, **more)
    for step in range(STEPS):
        (net(data(step, 4)) ** 2).sum(1).mean().backward()
        opt.step()
        opt.zero_grad()
    return net, opt


def accumulated(in_backward):
    """FSDP2 with micro-batches: every process has the same data, so its mean is the whole batch's."""
    net = model()
    for layer in (net[0], net[2], net):
        fully_shard(layer)
    opt = optim.AdamW(net.parameters(), lr=0.05, max_grad_norm=0.1, noise=True)
    for step in range(STEPS):
        for n in COUNTS:
            if in_backward:
                with opt.accumulating(n):
                    (net(data(step, n)) ** 2).sum(1).mean().backward()
            else:
                (net(data(step, n)) ** 2).sum(1).mean().backward()
                opt.accumulate(n)
        opt.step()
    return [whole(p) for p in net.parameters()], float(opt.grad_norm), opt.noise.trace


def resumed(folder):
    """FSDP2 through a distributed checkpoint in mid-training."""
    net, opt = fully_sharded("adamw")
    dcp.save({"optim": get_optimizer_state_dict(net, opt)}, checkpoint_id=folder)
    again = optim.AdamW(net.parameters(), lr=9.0, max_grad_norm=0.1)
    state = {"optim": get_optimizer_state_dict(net, again)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(net, again, state["optim"])
    (net(data(7, 4)) ** 2).sum(1).mean().backward()
    again.step()
    return [whole(p) for p in net.parameters()], all(
        isinstance(value, DTensor) for own in again.state.values() for name, value in own.items() if name != "step"
    )


def refusal(mesh):
    param = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    try:
        optim.SGD([param], lr=0.1)
    except UsageError as error:
        return str(error)
    return ""


def partial_gradient(mesh):
    """A gradient that is still a sum over processes, as a replicated weight has it under sequence parallelism."""
    param = torch.nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
    opt = optim.SGD([param], lr=1.0)
    param.grad = DTensor.from_local(torch.full((3,), 1.0 + dist.get_rank()), mesh, [Partial()])
    opt.step()
    return whole(param)


def main(rank, rendezvous, output):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    plane = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    found = {"refusal": refusal(mesh), "partial": partial_gradient(mesh)}
    for name, (where, placements) in placed(mesh, plane).items():
        for kind in ("sgd", "adamw", "lamb", "lars"):
            for accumulate in (False, True):
                params = place(list(model().parameters()), where, placements)
                opt = train(kind, params, accumulate=accumulate)
                found[name, kind, accumulate] = outcome(opt, params)
    params = place(list(model().parameters()), mesh, [[Replicate()]] * 4)
    found["replicated", "muon", False] = outcome(train("muon", params, accumulate=False), params)
    for kind in ("sgd", "adamw", "lamb"):
        net, opt = fully_sharded(kind)
        found["fsdp", kind] = [whole(p) for p in net.parameters()], float(opt.grad_norm)
    found["accumulate"], found["accumulating"] = accumulated(False), accumulated(True)
    folder = [tempfile.mkdtemp()] if rank == 0 else [None]
    dist.broadcast_object_list(folder)
    found["resumed"] = resumed(folder[0])
    if rank == 0:
        torch.save(found, output)
    gc.collect()  # models and what they communicate with go before the group they use
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's own threads can abort the interpreter on its way out; all results are written by now.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
