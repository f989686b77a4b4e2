"""The ideal twin beside a loop of one's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn.init import build
from mlcollage.papers.deep_bootstrap import DeepBootstrap, IdealTwin

N, BATCH, STEPS = 64, 16, 24


def model_fn():
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def make_twin(world, **changes):
    settings = {"n": N, "batch_size": BATCH, "steps": STEPS, "test_size": 100, "evaluations": 6}
    return IdealTwin(world, **{**settings, **changes})


def loop(world, after, *, before_step=lambda: None, optimizer_fn=None, start=lambda model, optimizer: None):
    """A loop as people write them: SGD with momentum and a cosine schedule on a fixed set."""
    x, y = world.batch(0, N)
    model = build(model_fn, 0)
    optimizer = (optimizer_fn or (lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)))(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.Generator().manual_seed(0)
    start(model, optimizer)
    for step in range(1, STEPS + 1):
        i = torch.randperm(N, generator=order)[:BATCH]
        optimizer.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        before_step()
        optimizer.step()
        scheduler.step()
        after(step, model)
    return model


def test_the_twin_is_the_ideal_world_of_the_framework(tiny_world):
    """Schedule, optimizer and initialization are taken from the loop; the result is DeepBootstrap's own Ideal World."""
    world = tiny_world()
    twin = make_twin(world)
    loop(world, twin.on_step, start=twin.start)
    study = DeepBootstrap(
        model_fn,
        world,
        n=N,
        batch_size=BATCH,
        steps=STEPS,
        seeds=[0],
        test_size=100,
        eval_at=6,
        device="cpu",
        stack=False,
        optimizer_fn=lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    ).run()
    ours, theirs = twin.result().select("ideal"), study.select("ideal")
    assert ours["step"].tolist() == theirs["step"].tolist()
    for metric in ("loss", "error", "soft_error"):
        assert ours[metric].tolist() == pytest.approx(theirs[metric].tolist(), rel=1e-5)


@pytest.mark.parametrize("optimizer_fn", [None, lambda p: torch.optim.AdamW(p, lr=0.01)])
def test_the_loop_is_not_changed(tiny_world, optimizer_fn):
    world = tiny_world()
    twin = make_twin(world, train=world.batch(0, N))
    torch.manual_seed(1)
    plain = loop(world, lambda step, model: torch.rand(1), optimizer_fn=optimizer_fn).state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(1)

    def after(step, model):
        twin.on_step(step, model)
        torch.rand(1)

    watched = loop(world, after, start=twin.start, optimizer_fn=optimizer_fn)
    assert watched.training
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(v, plain[k]) for k, v in watched.state_dict().items())


def test_result_has_both_worlds_and_the_train_set(tiny_world):
    world = tiny_world()
    twin = make_twin(world, train=world.batch(0, N))
    loop(world, twin.on_step, start=twin.start)
    result = twin.result()
    assert result.n == (N,)
    assert result.gap("soft_error", at=0)["gap"].tolist() == [0]
    assert set(result.curves["split"]) == {"train", "test"}
    assert result.stopping_time(N, "train_error", threshold=0.9) is not None
    assert result.curves["step"].max() == STEPS


def test_several_updates_between_calls_are_all_made_up_for(tiny_world):
    world = tiny_world()
    every, some = make_twin(world), make_twin(world)
    loop(world, every.on_step, start=every.start)
    loop(world, lambda step, model: some.on_step(step, model) if step % 4 == 0 else None, start=some.start)
    a, b = every.result().select("ideal"), some.result().select("ideal")
    assert a["loss"].iloc[-1] == b["loss"].iloc[-1]


def test_stop_lets_go_of_the_optimizer(tiny_world):
    twin = make_twin(tiny_world())
    model = model_fn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin.start(model, optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    twin.start(model, optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    twin.stop()
    assert len(optimizer._optimizer_step_pre_hooks) == 0


def test_bad_use_is_explained(tiny_world):
    world, model = tiny_world(), model_fn()
    with pytest.raises(InvalidInput, match="before start"):
        make_twin(world).on_step(1, model)
    with pytest.raises(InvalidInput, match="of another model"):
        make_twin(world).start(model, torch.optim.SGD(model_fn().parameters(), lr=0.1))
    twin = make_twin(world)
    twin.start(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(InvalidInput, match="made no update"):
        twin.on_step(1, model)
    with pytest.raises(InvalidInput, match="batch_size must be a whole number of at least 1, not 0"):
        make_twin(world, batch_size=0)
    with pytest.raises(InvalidInput, match="is no data world"):
        make_twin(object())
    with pytest.raises(InvalidInput, match="labels must be integers from 0 to 2"):
        make_twin(world, train=(torch.zeros(2, 5), torch.tensor([0, 3])))
    wrong = nn.Linear(5, 4)
    with pytest.raises(InvalidInput, match="the world's 3 classes need"):
        make_twin(world).start(wrong, torch.optim.SGD(wrong.parameters(), lr=0.1))
    twin = make_twin(world)
    with pytest.raises(InvalidInput, match=r"the Ideal World's loss became \S+ at step"):
        loop(world, twin.on_step, start=twin.start, optimizer_fn=lambda p: torch.optim.SGD(p, lr=1e38))


def test_accumulated_and_short_batches_have_their_weights(tiny_world):
    """Two halves with weight 1/2 are the whole batch; a shorter update uses the beginning of its batch."""

    def model_fn():
        return nn.Linear(5, 3).double()

    world, ends = tiny_world(dtype=torch.float64), []
    for parts in (None, [(8, 0.5), (8, 0.5)], [(12, 0.75), (4, 0.25)], [(4, 1.0)]):
        twin, model = make_twin(world), build(model_fn, 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        twin.start(model, optimizer)
        for step in range(1, 4):
            optimizer.zero_grad()
            F.cross_entropy(model(world.batch(0, 4)[0]), world.batch(0, 4)[1]).backward()
            optimizer.step()
            twin.on_step(step, model, parts)
        ends.append([p.detach() for p in twin._twin.parameters()])
    whole, halves, uneven, short = ends
    for other in (halves, uneven):
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(whole, other, strict=True))
    model = build(model_fn, 0)
    for t in range(3):
        x, y = (v[:4] for v in world.batch(t, BATCH))
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.3 * g
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(short, model.parameters(), strict=True))


def test_settings_that_cannot_be_followed_are_refused(tiny_world):
    world, model = tiny_world(), model_fn()
    with pytest.raises(InvalidInput, match="LBFGS calls the loss several times in one step"):
        make_twin(world).start(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InvalidInput, match=r"autocast must be torch\.bfloat16 or None"):
        make_twin(world, autocast=torch.float16)
    with pytest.raises(InvalidInput, match="clip_value must be a finite number above 0"):
        make_twin(world, clip_value=0)
    twin = make_twin(world)
    with pytest.raises(InvalidInput, match="used 32 samples, but batch_size is 16"):
        loop(world, lambda step, net: twin.on_step(step, net, [(16, 0.5), (16, 0.5)]), start=twin.start)


def test_test_samples_that_are_trained_on_are_found(tiny_world):
    class NoSplit(tiny_world):
        def fixed(self, n, *, seed=0, split="train"):
            return super().fixed(n, split="stream")

    twin = make_twin(NoSplit())
    with pytest.raises(InvalidInput, match="of 100 samples of the test block have come in the stream of seed 0"):
        loop(NoSplit(), twin.on_step, start=twin.start)
    world = tiny_world()
    with pytest.raises(InvalidInput, match="64 of 100 test samples of TinyWorld are also training samples"):
        make_twin(world, train=world.fixed(64, split="test").tensors)


class Careful:
    """A plain loop of four updates, whose author does something to gradients."""

    def __init__(self, world, **options):
        self.world, self.model = world, model_fn()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        self.twin = make_twin(world, **options)

    def run(self, *, clear=True, change=None, between=None):
        self.twin.start(self.model, self.optimizer)
        for step in range(1, 5):
            if clear:
                self.optimizer.zero_grad(set_to_none=step % 2 == 0)
            x, y = self.world.batch(step, BATCH)
            F.cross_entropy(self.model(x), y).backward()
            if change is not None:
                change(self.model)
            self.optimizer.step()
            if between is not None:
                between(self.model, x, y)
            self.twin.on_step(step, self.model)
        self.twin.stop()


def halve(model):
    for p in model.parameters():
        p.grad.mul_(0.5)


def in_place(gradient):
    gradient.mul_(0.5)


def halve_one(p):
    p.grad.mul_(0.5)


def first_hook(model, hook, name="register_hook"):
    getattr(next(model.parameters()), name)(hook)


def test_gradients_that_add_up_over_updates_are_refused(tiny_world):
    with pytest.raises(InvalidInput, match="not cleared before the backward pass of update 2"):
        Careful(tiny_world()).run(clear=False)


def test_gradients_that_the_loop_changes_are_refused_unless_told(tiny_world):
    def clips(model):
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    def cuts(model):
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)

    def unscales(model):
        for p in model.parameters():
            p.grad.mul_(2.0**-16)

    world = tiny_world()
    for change in (halve, clips, cuts):
        with pytest.raises(InvalidInput, match=r"the gradients of update 1 .* are not those that backward gave"):
            Careful(world).run(change=change)
    with pytest.raises(InvalidInput, match=r"clipped by clip_norm=0\.01"):
        Careful(world, clip_norm=0.01).run()
    Careful(world, clip_norm=0.01).run(change=clips)
    Careful(world, clip_value=1e-3).run(change=cuts)
    Careful(world, clip_norm=100.0).run(change=unscales)
    Careful(world).run(change=unscales)  # as a scaler of gradients


@pytest.mark.parametrize("late", [False, True])
def test_hooks_on_parameters_are_refused_if_they_change_gradients(tiny_world, late):
    changing = [
        (lambda g: g.clamp(-1e-6, 1e-6), "register_hook"),
        (in_place, "register_hook"),
        (halve_one, "register_post_accumulate_grad_hook"),
    ]
    looking = [(lambda g: None, "register_hook"), (lambda g: g, "register_hook")]
    for hook, name in changing:
        mine = Careful(tiny_world())
        begun = iter([late, False, False, False])
        if not late:
            first_hook(mine.model, hook, name)

        def between(model, x, y, hook=hook, name=name, begun=begun):
            if next(begun):  # while training
                first_hook(model, hook, name)

        with pytest.raises(
            InvalidInput, match=r"0\.weight changes its gradient" if not late else r"changes its|not those"
        ):
            mine.run(between=between)
    for hook, name in looking:
        mine = Careful(tiny_world())
        first_hook(mine.model, hook, name)
        mine.run()
        assert len(next(mine.model.parameters())._backward_hooks) == 1, "hooks of the twin stayed"


def test_gradients_taken_between_updates_are_no_fault(tiny_world):
    def between(model, x, y):
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    mine = Careful(tiny_world())
    mine.run(between=between)
    p = next(mine.model.parameters())
    assert not p._backward_hooks
    assert not p._post_accumulate_grad_hooks
