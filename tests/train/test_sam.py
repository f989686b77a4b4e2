import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn.init import build
from mlcollage.train.sam import SAM


def problem():
    model = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 0).double()
    g = torch.Generator().manual_seed(1)
    return model, torch.randn(12, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (12,), generator=g)


def closure_of(model, x, y):
    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(model, x, y, rho, lr, adaptive=False, offset=0.01):
    """The equations of the papers, on one flat vector."""
    parameters = list(model.parameters())
    g = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    t = [p.detach().abs() + offset if adaptive else torch.ones_like(p) for p in parameters]
    length = torch.cat([(a * b).flatten() for a, b in zip(t, g, strict=True)]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, a, b in zip(moved.parameters(), t, g, strict=True):
            p += rho * a**2 * b / length
    there = torch.autograd.grad(F.cross_entropy(moved(x), y), list(moved.parameters()))
    return torch.cat([(p.detach() - lr * h).flatten() for p, h in zip(parameters, there, strict=True)])


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_update_follows_the_equations(adaptive):
    model, x, y = problem()
    expected = by_hand(model, x, y, 0.3, 0.1, adaptive)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, lr=0.1)
    loss = optimizer.step(closure_of(model, x, y))
    torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-12)
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(problem()[0](x), y)), rel=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_stacked_parameters_take_a_step_for_each_network(adaptive):
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(3, *shape, generator=g, dtype=torch.float64) for shape in ((4, 2), (2,), ())]
    rho, goals = [0.1, 0.5, 0.0], torch.arange(3, dtype=torch.float64)

    def train(weights, goal, rho, stacked):
        weights = [w.clone().requires_grad_() for w in weights]
        optimizer = SAM(weights, torch.optim.SGD, rho=rho, adaptive=adaptive, stacked=stacked, lr=0.1)

        def closure():
            along = [goal.view(-1, *(1,) * (w.ndim - 1)) if stacked else goal for w in weights]
            loss = sum(((w - a) ** 4).sum() for w, a in zip(weights, along, strict=True))
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return [w.detach() for w in weights]

    together = train(start, goals, rho, True)
    for r in range(3):
        alone = train([w[r] for w in start], goals[r], rho[r], False)
        torch.testing.assert_close([w[r] for w in together], alone, rtol=1e-12, atol=1e-12)


def test_two_steps_are_the_closure():
    (a, x, y), (b, _, _) = problem(), problem()
    one = SAM(a.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    two = SAM(b.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    for _ in range(3):
        one.step(closure_of(a, x, y))
        closure_of(b, x, y)()
        two.first_step(zero_grad=True)
        closure_of(b, x, y)()
        two.second_step(zero_grad=True)
    assert torch.equal(flat(a), flat(b))


def test_with_rho_zero_it_is_the_base_optimizer():
    (a, x, y), (b, _, _) = problem(), problem()
    sam, adam = SAM(a.parameters(), torch.optim.Adam, rho=0.0, lr=0.01), torch.optim.Adam(b.parameters(), lr=0.01)
    for _ in range(4):
        sam.step(closure_of(a, x, y))
        adam.zero_grad()
        closure_of(b, x, y)()
        adam.step()
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-12, atol=1e-12)


def test_accumulated_micro_batches_are_the_whole_batch():
    (a, x, y), (b, _, _) = problem(), problem()
    SAM(a.parameters(), torch.optim.SGD, rho=0.2, lr=0.1).step(closure_of(a, x, y))
    optimizer = SAM(b.parameters(), torch.optim.SGD, rho=0.2, lr=0.1)
    for move in (optimizer.first_step, optimizer.second_step):
        for half in (slice(0, 6), slice(6, 12)):
            (F.cross_entropy(b(x[half]), y[half]) / 2).backward()
        move(zero_grad=True)
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-12)


def test_the_direction_uphill_does_not_depend_on_a_gradient_scale():
    (a, x, y), (b, _, _) = problem(), problem()
    for model, scale in ((a, 1.0), (b, 1024.0)):
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        (scale * F.cross_entropy(model(x), y)).backward()
        optimizer.first_step()
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-12)


def test_a_gradient_scaler_updates_or_skips():
    (a, x, y), (b, _, _) = problem(), problem()
    SAM(a.parameters(), torch.optim.SGD, lr=0.1).step(closure_of(a, x, y))
    optimizer, scaler = SAM(b.parameters(), torch.optim.SGD, lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def update(spoil):
        scaler.scale(F.cross_entropy(b(x), y) * spoil).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(F.cross_entropy(b(x), y)).backward()
        optimizer.restore()
        scaler.step(optimizer.base_optimizer)
        scaler.update()
        optimizer.zero_grad()

    update(1.0)
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-12)
    update(math.inf)
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-12)
    assert scaler.get_scale() == 2.0**7


def test_schedulers_state_and_groups():
    model, x, y = problem()
    groups = [{"params": model[0].parameters(), "rho": 0.0}, {"params": model[2].parameters()}]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.5, lr=0.4, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(closure_of(model, x, y))
    scheduler.step()
    assert [g["lr"] for g in optimizer.base_optimizer.param_groups] == [0.2, 0.2]
    assert [g["rho"] for g in optimizer.param_groups] == [0.0, 0.5]
    other = copy.deepcopy(model)
    resumed = SAM(
        [{"params": other[0].parameters()}, {"params": other[2].parameters()}], torch.optim.SGD, lr=9, momentum=0.9
    )
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own loading shares tensors
    for net, opt in ((model, optimizer), (other, resumed)):
        opt.step(closure_of(net, x, y))
    assert torch.equal(flat(model), flat(other))


def test_frozen_parameters_stay():
    model, x, y = problem()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    SAM(model.parameters(), torch.optim.SGD, lr=0.1).step(closure_of(model, x, y))
    assert torch.equal(model[0].weight, before)


def test_bad_use_is_explained():
    model, x, y = problem()
    for settings in ({"rho": -1.0}, {"rho": math.nan}, {"offset": -1.0}):
        with pytest.raises(InvalidInput, match="at least 0"):
            SAM(model.parameters(), torch.optim.SGD, lr=0.1, **settings)
    with pytest.raises(InvalidInput, match="base_optimizer"):
        SAM(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(InvalidInput, match="two gradients"):
        optimizer.step()
    with pytest.raises(InvalidInput, match="backward"):
        optimizer.first_step()
    with pytest.raises(InvalidInput, match="first_step, which moves"):
        optimizer.second_step()
    closure_of(model, x, y)()
    optimizer.first_step()
    with pytest.raises(InvalidInput, match="half done"):
        optimizer.state_dict()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_loss_of_another_copy_is_refused_and_moves_nothing(set_to_none):
    model = nn.Linear(3, 2)
    other, x = copy.deepcopy(model), torch.ones(4, 3)
    before = copy.deepcopy(model.state_dict())
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    model(x).sum().backward()  # gradients of an earlier time must not pass for new ones
    optimizer.zero_grad(set_to_none=set_to_none)
    other(x).sum().backward()
    with pytest.raises(InvalidInput, match=r"first_step was called before any gradient was there.*not of a copy"):
        optimizer.first_step()
    model(x).sum().backward()
    optimizer.first_step(zero_grad=True)
    other(x).sum().backward()
    with pytest.raises(InvalidInput, match="second_step was called before any gradient"):
        optimizer.second_step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
