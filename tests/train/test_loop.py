"""The training loop: what each step does, what it leaves alone, and what it refuses."""

from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn.convnet import ConvNet
from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.train.loop import accuracy, epochs, evaluate, evaluating, predict, steps
from mlcollage.train.schedules import cosine


def blobs(n=96, features=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (n,), generator=g)
    centers = 2 * torch.randn(3, features, generator=g)
    return (centers[y] + torch.randn(n, features, generator=g)).to(dtype), y


def with_dropout():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def train(model_fn=with_dropout, seed=0, n=20, body=lambda step: None, **kwargs):
    x, y = blobs()
    model = build(model_fn, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in steps(model, epochs(x, y, 32, generator=seed), optimizer, max_steps=n, seed=seed, **kwargs):
        losses.append(float(step.loss))
        body(step)
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_every_step_is_the_plain_update_written_out():
    x, y = blobs(dtype=torch.float64)
    model, twin = (build(lambda: MLP((6,), 3, (8,)), 0).double() for _ in range(2))
    ours = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 12)
    batches = list(islice(epochs(x, y, 32, generator=1), 12))
    for step, (bx, by) in zip(steps(model, batches, ours, schedule=cosine(12), clip_norm=0.5), batches, strict=True):
        assert step.lr == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-12)
        assert torch.equal(step.x, bx)
        theirs.zero_grad()
        logits = twin(bx)
        loss = F.cross_entropy(logits, by)
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        theirs.step()
        scheduler.step()
        torch.testing.assert_close(step.loss, loss.detach())
        torch.testing.assert_close(step.logits, logits.detach())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert step.number == 12
    assert not step.loss.requires_grad


def test_the_same_seed_gives_the_same_numbers_whatever_else_is_drawn():
    torch.manual_seed(0)
    losses, weights = train()
    torch.manual_seed(99)
    again, weights_again = train(body=lambda step: torch.rand(7))
    assert losses == again
    assert torch.equal(weights, weights_again)
    other, _ = train(seed=1)
    assert other != losses


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(n=3)
    assert torch.equal(torch.rand(4), expected)


def test_dropout_noise_differs_from_step_to_step():
    x, y = torch.ones(8, 6), torch.zeros(8, dtype=torch.long)
    model = build(with_dropout, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = [float(s.loss) for s in steps(model, [(x, y)] * 5, optimizer)]
    assert len(set(losses)) == 5


def test_clipping_bounds_the_length_of_the_gradient():
    x, y = blobs()
    model = build(with_dropout, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in steps(model, epochs(100 * x, y, 32, generator=0), optimizer, clip_norm=0.1, max_steps=3):
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert float(norm) == pytest.approx(0.1, rel=1e-4)


def test_autocast_trains_with_float32_parameters_close_to_full_precision():
    full, weights = train(lambda: MLP((6,), 3, (16,)), n=15)
    half, weights_half = train(lambda: MLP((6,), 3, (16,)), n=15, autocast=torch.bfloat16)
    assert weights_half.dtype == torch.float32
    assert not torch.equal(weights, weights_half)
    assert half == pytest.approx(full, rel=0.05, abs=0.01)


def test_compiled_models_train_to_the_same_numbers():
    losses, _ = train(lambda: MLP((6,), 3, (16,)), n=5)
    x, y = blobs()
    model = build(lambda: MLP((6,), 3, (16,)), 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    compiled = torch.compile(model, backend="eager")
    batches = epochs(x, y, 32, generator=0)
    assert [float(s.loss) for s in steps(compiled, batches, optimizer, max_steps=5)] == pytest.approx(losses)


def test_a_resumed_run_continues_the_schedule_and_the_noise():
    x, y = blobs()
    batches = list(islice(epochs(x, y, 32, generator=0), 10))

    def run(*parts):
        model = build(with_dropout, 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        done = []
        for start, end in parts:
            kwargs = {"schedule": cosine(10), "start": start, "max_steps": end}
            done += [(s.number, s.lr, float(s.loss)) for s in steps(model, batches[start:], optimizer, **kwargs)]
        return done

    assert run((0, 4), (4, 10)) == run((0, 10))


def test_no_batch_is_drawn_beyond_max_steps():
    drawn = []

    def batches():
        for i in range(100):
            drawn.append(i)
            yield blobs(8)

    model = build(with_dropout, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(list(steps(model, batches(), optimizer, max_steps=3))) == 3
    assert drawn == [0, 1, 2]


@pytest.mark.parametrize("check_every", [1, 4])
def test_a_loss_that_is_not_finite_names_its_step(check_every):
    x, y = blobs()
    bad = x.clone()
    bad[0, 0] = float("nan")
    model = build(with_dropout, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(x, y)] * 5 + [(bad, y)] + [(x, y)] * 4
    with pytest.raises(InvalidInput, match="the loss became nan at step 6; lower the learning rate"):
        list(steps(model, batches, optimizer, check_every=check_every))
    if check_every == 1:  # stopped before the update that would have spoilt the weights
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_bad_loss_in_the_last_steps_is_found_although_they_do_not_fill_a_check():
    x, y = blobs()
    model = build(with_dropout, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInput, match="at step 2"):
        list(steps(model, [(x, y), (x * float("inf"), y)], optimizer, check_every=10))


@pytest.mark.parametrize("drop_last", [True, False])
def test_every_sample_comes_once_an_epoch_in_a_new_order(drop_last):
    x = torch.arange(10.0)
    batches = epochs(x, x.long(), 3, generator=0, drop_last=drop_last)
    length = 3 if drop_last else 4
    seen = [[int(v) for bx, by in islice(batches, length) for v in by] for _ in range(20)]
    for epoch in seen:
        assert len(set(epoch)) == len(epoch) == (9 if drop_last else 10)
    assert len({tuple(e) for e in seen}) == 20
    assert {v for e in seen for v in e} == set(range(10))


def test_inputs_and_targets_stay_together_and_the_generator_sets_the_order():
    x = torch.arange(12.0).view(12, 1)
    first, second = (epochs(x, x[:, 0].long(), 4, generator=s) for s in (7, torch.Generator().manual_seed(7)))
    for (ax, ay), (bx, _) in islice(zip(first, second, strict=False), 9):
        assert torch.equal(ax[:, 0].long(), ay)
        assert torch.equal(ax, bx)


def test_augmentation_draws_from_the_generator():
    x, y = torch.zeros(8, 2), torch.zeros(8, dtype=torch.long)

    def noise(x, g):
        return x + torch.randn(x.shape, generator=g)

    a, b = (next(epochs(x, y, 4, generator=1, augment=noise))[0] for _ in range(2))
    assert torch.equal(a, b)
    assert a.abs().sum() > 0


def test_evaluation_restores_the_mode_of_every_module_also_after_an_error():
    model = ConvNet((1, 8, 8), 3, (4,)).train()
    model.norm1.eval()
    x, y = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(5, dtype=torch.long)
    before = model.norm1.running_mean.clone()
    value = evaluate(model, x, y, accuracy, batch_size=2)
    assert 0 <= value <= 1
    assert model.training
    assert not model.norm1.training
    assert torch.equal(model.norm1.running_mean, before)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, x, y, lambda logits, y: 1 / 0)
    assert model.training
    with evaluating(model):
        assert not model.training
    assert model.training


def test_prediction_in_parts_equals_prediction_at_once():
    model, (x, _) = build(with_dropout, 0), blobs(20)
    out = predict(model, x, batch_size=7)
    assert not out.requires_grad
    torch.testing.assert_close(out, model.eval()(x).detach())


def test_bad_input_is_explained():
    x, y = blobs()
    model = build(with_dropout, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInput, match="96 samples but y holds 95"):
        epochs(x, y[:-1], 8, generator=0)
    with pytest.raises(InvalidInput, match=r"96 samples do not fill one batch of 97.*drop_last=False"):
        epochs(x, y, 97, generator=0)
    with pytest.raises(InvalidInput, match="batch 1 must be a pair of tensors"):
        next(steps(model, [x], optimizer))
    with pytest.raises(InvalidInput, match=r"the loss must be one number, but has shape \(96,\)"):
        next(steps(model, [(x, y)], optimizer, loss=lambda a, b: F.cross_entropy(a, b, reduction="none")))
    with pytest.raises(InvalidInput, match=r"autocast must be torch\.bfloat16"):
        next(steps(model, [(x, y)], optimizer, autocast=torch.float16))
    with pytest.raises(InvalidInput, match="clip_norm must be a finite number above 0"):
        next(steps(model, [(x, y)], optimizer, clip_norm=0.0))
    with pytest.raises(InvalidInput, match=r"the schedule's factor at step 0 must be .*, not nan"):
        next(steps(model, [(x, y)], optimizer, schedule=lambda t: float("nan")))
    with pytest.raises(InvalidInput, match="at least one sample"):
        predict(model, x[:0])


def test_an_optimizer_that_calls_the_loss_itself_is_given_it():
    """LBFGS minimizes least squares in a few steps, as scipy's solution says."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=g, dtype=torch.float64), torch.randn(30, 1, generator=g, dtype=torch.float64)
    model = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, tolerance_grad=1e-12, tolerance_change=1e-15)
    for _ in steps(model, [(x, y)] * 3, optimizer, loss=torch.nn.functional.mse_loss):
        pass
    best = torch.linalg.lstsq(x, y).solution
    assert torch.allclose(model.weight.detach().T, best, atol=1e-6)


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.net(x), x


def test_what_people_pass_works_or_gets_a_sentence():
    x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    runs = []
    for inputs in (x, x.double()):
        model = build(lambda: torch.nn.Linear(3, 2), 0)
        list(steps(model, [(inputs, y)] * 3, torch.optim.SGD(model.parameters(), lr=0.1)))
        runs.append(predict(model, inputs))
    assert torch.equal(*runs)
    assert len(next(epochs(x, y, np.int64(4), generator=np.int64(0)))[0]) == 4
    model = Pair()
    with pytest.raises(InvalidInput, match="Pair returns a tuple; one tensor is needed"):
        list(steps(model, [(x, y)], torch.optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(InvalidInput, match="Pair returns a tuple"):
        predict(model, x)
    with pytest.raises(InvalidInput, match=r"must be a torch\.optim\.Optimizer, not a function"):
        list(steps(model, [(x, y)], lambda p: torch.optim.SGD(p, lr=0.1)))
    for call in (lambda: predict(model, x.numpy()), lambda: epochs(x.numpy(), y.numpy(), 4, generator=0)):
        with pytest.raises(InvalidInput, match="x must be a tensor, not a ndarray"):
            call()
