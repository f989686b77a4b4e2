"""What one of two processes under DistributedDataParallel finds. Started by test_fisher_distributed.py."""

import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.nn.init import build
from mlcollage.papers.fisher_explosion import FisherPenalty

CASES = {
    "minibatch": {"labels": "true"},
    "batch": {"labels": "true", "normalize": "batch"},
    "jvp": {"labels": "true", "mode": "jvp"},
    "finite_difference": {"labels": "true", "mode": "finite_difference"},
    "input": {"labels": "true", "wrt": "input"},
    "per_example": {"labels": "true", "estimator": "per_example"},
    "drawn": {"labels": "model"},
}


def problem():
    model = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 0).double()
    g = torch.Generator().manual_seed(1)
    return model, torch.randn(8, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (8,), generator=g)


def gradient(network, model, x, y, settings):
    """Gradient of loss + penalty, and the penalty, as a training loop gets them."""
    x = x.clone().requires_grad_(settings.get("wrt") == "input")
    penalty = FisherPenalty(network, 0.5, interval=1, **settings)
    labels = y if settings["labels"] == "true" else None
    model.zero_grad()
    loss = F.cross_entropy(network(x), y)
    if "mode" in settings:
        loss.backward()
        value = penalty.add_gradient_(lambda: network(x), y=labels)
    else:
        logits = network(x)
        value = penalty(logits, x, labels)
        (F.cross_entropy(logits, y) + value).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).numpy(), float(value.detach())


def gradients(rank, size):
    """Gradients and penalties of all cases in one of the processes."""
    model, x, y = problem()
    network = nn.parallel.DistributedDataParallel(model)
    mine, found = slice(4 * rank, 4 * rank + 4), {}
    for name, settings in CASES.items():
        for _ in range(2):  # twice, so that a reducer left waiting would show
            found[name], found[f"{name}_value"] = gradient(network, model, x[mine], y[mine], settings)
    return found
