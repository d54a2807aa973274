"""One of two processes that train the same model sharded; started by tests/optim/test_dtensor.py.

python dtensor_worker.py RANK RENDEZVOUS_FILE OUTPUT
"""

import copy
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
MUON_RATES = {"adamw_lr": 0.02, "adamw_weight_decay": 0.3, "weight_decay": 0.2}
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


def odd():
    """A row (one process holds all of it), a convolution, two times experts, a transposed matrix."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(1, 5), (5, 2, 3, 3), (3, 4, 5), (3, 4, 5), (7, 3)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(tensor) for tensor in [*made[:4], made[4].t()]]


MATRICES = {  # "rows": experts are whole on each process; "columns": they are spread
    "rows": [[Shard(0)]] * 5,
    "columns": [[Shard(1)], [Shard(1)], [Shard(1)], [Shard(2)], [Shard(1)]],
}


def by_muon(params):
    """Weights and momentum after a few steps, with convolutions flattened and experts as a batch."""
    groups = [{"params": params[:2], "flatten": True}, {"params": params[2:]}]
    opt = optim.Muon(groups, lr=0.05, flatten=False)
    generator = torch.Generator().manual_seed(8)
    for _ in range(STEPS):
        for param in params:
            grad = torch.randn(param.shape, generator=generator)
            placed = isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if placed else grad
        opt.step()
    return [(whole(p), whole(opt.state[p]["momentum_buffer"])) for p in params]


def steps_of(opt, params, steps):
    for step in steps:
        for param, grad in zip(params, gradients(step, 3), strict=True):
            param.grad = grad
        opt.step()


def zero(params, maker, **options):
    """Imported where it is used: torch's own module warns of deprecation."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class=maker, **options)


def by_zero(kind):
    """ZeRO: weights after a checkpoint in mid-training, and the checkpoint. One process has matrices alone."""
    maker, options = KINDS[kind]
    options = options | MUON_RATES if kind == "muon" else options
    params = list(model().parameters())
    opt = zero(params, maker, lr=0.05, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    steps_of(opt, params, range(2))
    schedule.step()
    opt.consolidate_state_dict(to=0)
    saved = [opt.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    again = zero(params, maker, lr=9.0, **options)
    again.load_state_dict(copy.deepcopy(saved[0]))
    steps_of(again, params, range(2, 4))
    return [whole(p) for p in params], saved[0]


def zero_groups():
    """Groups that say what they are; AdamW's rate is left out, and another group comes late."""
    params = list(model().parameters())
    groups = [{"params": params[:1], "use_muon": True}, {"params": params[1:3], "use_muon": False}]
    opt = zero(groups, optim.Muon, lr=0.05, adamw_lr=0.02)
    opt.add_param_group({"params": params[3:]})
    steps_of(opt, params, range(STEPS))
    return [whole(p) for p in params]


def zero_refusals():
    """What needs the gradients of all processes."""
    said = []
    for options in ({"max_grad_norm": 1.0}, {"noise": True}):
        try:
            zero(model().parameters(), optim.AdamW, lr=0.05, **options)
        except UsageError as error:
            said.append(str(error))
    return said


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
        for kind in ("sgd", "adamw", "lamb", "lars", "muon"):
            for accumulate in (False, True):
                params = place(list(model().parameters()), where, placements)
                opt = train(kind, params, accumulate=accumulate)
                found[name, kind, accumulate] = outcome(opt, params)
    for name, placements in MATRICES.items():
        found["matrices", name] = by_muon([place([p], mesh, [at])[0] for p, at in zip(odd(), placements, strict=True)])
    for kind in KINDS:
        found["zero", kind] = by_zero(kind)
    found["zero", "groups"] = zero_groups()
    found["zero", "refusals"] = zero_refusals()
    for kind in ("sgd", "adamw", "lamb", "muon"):
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
