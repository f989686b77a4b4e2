"""The ideal twin beside a loop: plain, and driven as Lightning and the Hugging Face Trainer drive their twins."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn.init import build
from mlcollage.papers.deep_bootstrap import DeepBootstrap, HuggingFaceBootstrap, IdealTwin, LightningBootstrap

N, BATCH, STEPS = 64, 16, 24


def model_fn():
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def make_twin(world, kind=IdealTwin, **changes):
    settings = {"n": N, "batch_size": BATCH, "steps": STEPS, "test_size": 100, "evaluations": 6}
    return kind(world, **{**settings, **changes})


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
    with pytest.raises(InvalidInput, match="not the model's"):
        make_twin(world).start(model, torch.optim.SGD(model_fn().parameters(), lr=0.1))
    twin = make_twin(world)
    twin.start(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(InvalidInput, match="no update of the optimizer"):
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


# ---- callbacks of the two frameworks, driven by a stand-in of each trainer ----


def test_lightning_protocol(tiny_world):
    world = tiny_world()
    callback, plain = make_twin(world, LightningBootstrap), make_twin(world)
    trainer = SimpleNamespace(optimizers=[], global_step=0)

    def start(model, optimizer):
        trainer.optimizers.append(optimizer)
        model._trainer = trainer
        callback.on_train_start(trainer, model)
        assert model._trainer is trainer

    def after(step, model):
        callback.on_train_batch_end(trainer, model, None, None, step)  # an accumulating batch: no new step
        trainer.global_step = step
        callback.on_train_batch_end(trainer, model, None, None, step)

    model = loop(world, after, start=start)
    callback.on_train_end(trainer, model)
    loop(world, plain.on_step, start=plain.start)
    assert callback.result().curves.equals(plain.result().curves)
    trainer.optimizers *= 2
    with pytest.raises(InvalidInput, match="2 optimizers"):
        callback.on_train_start(trainer, model)


def test_transformers_protocol(tiny_world):
    world = tiny_world()
    callback, plain = make_twin(world, HuggingFaceBootstrap), make_twin(world)
    state = SimpleNamespace(global_step=0)

    def start(model, optimizer):
        wrapped = SimpleNamespace(optimizer=optimizer)  # as accelerate does
        callback.on_train_begin(None, state, None, model=model, optimizer=wrapped)

    def after(step, model):
        state.global_step = step
        callback.on_step_end(None, state, None, model=model)

    model = loop(world, after, start=start)
    callback.on_train_end(None, state, None, model=model)
    loop(world, plain.on_step, start=plain.start)
    assert callback.result().curves.equals(plain.result().curves)


def test_a_lightning_trainer_takes_it(tiny_world, tmp_path):
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = build(model_fn, 0)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3)

    world = tiny_world()
    callback = make_twin(world, LightningBootstrap)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_steps=STEPS, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **silent)
    trainer.fit(Module(), DataLoader(TensorDataset(*world.batch(0, N)), batch_size=BATCH))
    assert callback.result().curves["step"].max() == STEPS
    assert (callback.result().gap("loss", at=1)["gap"] == 0).all(), "one run until a sample comes back"
