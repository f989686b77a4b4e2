"""What one of several processes that hold parts of one batch gets. Started by test_barlow_distributed.py."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.flop_counter import FlopCounterMode

from mlcollage.errors import InvalidInput
from mlcollage.papers.barlow_twins import barlow_twins_loss

UNEQUAL = (0, 2, 3, 7)  # rows of three processes, fewer than the nine columns


def official():
    with np.load(Path(__file__).parent / "official" / "distributed.npz") as file:
        return {name: torch.from_numpy(value) for name, value in file.items()}


class Net(nn.Module):
    """Two linear layers, a batch norm over all processes, ReLU and a linear layer, as in the official numbers."""

    def __init__(self, case, arrays):
        super().__init__()
        names = ("w0", "w1", "g1", "b1", "w2")
        self.p = nn.ParameterDict({n: nn.Parameter(arrays[f"{case}/param/{n}"].clone()) for n in names})

    def forward(self, x):
        h = x @ self.p["w0"].T @ self.p["w1"].T
        sums = all_reduce(torch.cat([h.sum(0), h.square().sum(0), h.new_tensor([float(len(h))])]))
        mean, square = sums[:-1].div(sums[-1]).chunk(2)
        h = (h - mean) / (square - mean.square() + 1e-5).sqrt() * self.p["g1"] + self.p["b1"]
        return h.relu() @ self.p["w2"].T


WIDE = {
    "plain": {},
    "listing": {"correction": 1, "eps": 0.0},
    "feature": {"normalize": "feature"},
    "none": {"normalize": "none"},
    "hsic": {"target": "hsic"},
}


def unequal(columns=9):
    """Views of seven samples and a linear map to nine columns."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(7, 5, generator=g, dtype=torch.float64)
    model = nn.Linear(5, columns, bias=False).double()
    model.weight.data = torch.randn(columns, 5, generator=g, dtype=torch.float64)
    return model, x, x + 0.3 * torch.randn(7, 5, generator=g, dtype=torch.float64)


def of_the_official_code(rank, size):
    arrays, found = official(), {}
    for case in ("w2", "w2_wide"):
        for scale in ("exact", "official"):
            net = nn.parallel.DistributedDataParallel(Net(case, arrays))
            start, stop = arrays[f"{case}/split"][rank : rank + 2].tolist()
            x_a, x_b = (arrays[f"{case}/{x}"][start:stop].double() for x in ("x_a", "x_b"))
            lambd = float(arrays[f"{case}/lambd"])
            loss = barlow_twins_loss(net(x_a), net(x_b), lambd=lambd, group=dist.group.WORLD, grad_scale=scale)
            loss.backward()
            found[f"{case}/{scale}/loss"] = loss.detach()
            found.update({f"{case}/{scale}/{n}": p.grad for n, p in net.module.p.items()})
    in_blocks(rank, found, ((0, 3), (3, 7))[rank])
    return found


def in_blocks(rank, found, part):
    """Far fewer rows than columns, for which each process computes its own rows of the Gram matrices."""
    model, x_a, x_b = unequal(40)
    net, rows = nn.parallel.DistributedDataParallel(model), slice(*part)
    for name, settings in WIDE.items():
        model.zero_grad()
        loss = barlow_twins_loss(net(x_a[rows]), net(x_b[rows]), group=dist.group.WORLD, **settings)
        loss.backward()
        found[f"wide/{name}/loss"], found[f"wide/{name}/grad"] = loss.detach(), model.weight.grad.clone()
    with torch.no_grad():
        found["wide/no_grad"] = barlow_twins_loss(model(x_a[rows]), model(x_b[rows]), group=dist.group.WORLD)
    z, other = (model(x[rows]).detach() for x in (x_a, x_b))
    z.requires_grad_(rank == 0)  # one process alone wants gradients
    with FlopCounterMode(display=False) as counter:
        loss = barlow_twins_loss(z, other, group=dist.group.WORLD, check=False)
    found["wide/flops"] = counter.get_total_flops()
    if rank == 0:
        try:
            torch.autograd.grad(loss, z, create_graph=True)
        except InvalidInput as error:
            found["wide/second"] = str(error)


def of_unequal_parts(rank, size):
    found = {}
    model, x_a, x_b = unequal()
    net = nn.parallel.DistributedDataParallel(model)
    rows = slice(UNEQUAL[rank], UNEQUAL[rank + 1])
    for impl in ("direct", "gram", "tiled", "blocks"):
        model.zero_grad()
        loss = barlow_twins_loss(net(x_a[rows]), net(x_b[rows]), impl=impl, group=dist.group.WORLD)
        loss.backward()
        found[f"{impl}/loss"], found[f"{impl}/grad"] = loss.detach(), model.weight.grad.clone()
    in_blocks(rank, found, (UNEQUAL[rank], UNEQUAL[rank + 1]))
    found["half"] = barlow_twins_loss(x_a[rows].half(), x_b[rows].half(), group=dist.group.WORLD)
    narrow = x_a[rows, : 4 + (rank == 1)]
    for name, a, b in (
        ("shape", x_a[rows], x_b[rows, : 5 - (rank == 2)]),  # wrong in the last process only
        ("width", narrow, narrow),  # a different one in the second
        ("nan", torch.where(torch.tensor(rank == 0), torch.nan, x_a[rows]), x_b[rows]),
    ):
        try:
            barlow_twins_loss(a, b, group=dist.group.WORLD)
        except InvalidInput as error:
            found[f"refused/{name}"] = str(error)
    return found
