"""Twins in real trainers: on a world that hands out the training set in the loader's order, both worlds are one run."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from mlcollage.errors import InvalidInput
from mlcollage.nn.init import build
from mlcollage.papers.deep_bootstrap import HuggingFaceBootstrap, LightningBootstrap
from mlcollage.train.trainer_settings import transformers_settings

B = 8
SHAPE = (1, 8, 8)


class Replay:
    """A world whose stream is the training set over and over; an update that is short is filled up with its start."""

    num_classes, shape = 3, SHAPE

    def __init__(self, x, y, update):
        self.x, self.y = x, y
        self.order = torch.cat([torch.arange(len(x)), torch.arange(-len(x) % update)])

    def batch(self, step, batch_size, *, split="stream"):
        index = self.order[torch.arange(step * batch_size, (step + 1) * batch_size) % len(self.order)]
        return self.x[index], self.y[index]

    def fixed(self, n, *, seed=0, split="train"):
        return TensorDataset(*data(n, seed=9))


def data(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *SHAPE, generator=g), torch.randint(0, 3, (n,), generator=g)


class Module(pl.LightningModule):
    def __init__(self, smoothing=0.0, dropout=0.0):
        super().__init__()
        self.smoothing = smoothing
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1], label_smoothing=self.smoothing)

    def configure_optimizers(self):
        decayed, others = list(self.net[1].parameters()), [*self.net[2].parameters(), *self.net[5].parameters()]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.1}]
        optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fit(module, n=44, batch=None, options=None, callback=LightningBootstrap, **settings):
    x, y = data(n)
    twin = callback(Replay(x, y, B * settings.get("accumulate_grad_batches", 1)), test_size=50, **(options or {}))
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=[twin], **silent, **settings)
    trainer.fit(module, batch or DataLoader(TensorDataset(x, y), batch_size=B))
    return twin


def close(twin):
    """Both worlds are one run, and it has gone somewhere."""
    gaps = twin.result().gaps("loss")
    assert gaps["gap"].abs().max() < 1e-5
    assert gaps["step"].max() == twin.twin.steps
    return gaps["real"].max() - gaps["real"].min() > 0.005


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 4},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
    ],
)
@pytest.mark.parametrize("n", [48, 44])  # 44: the last batch of an epoch is short
def test_lightning(settings, n):
    twin = fit(build(Module, 0), n, **settings)
    assert close(twin)
    assert twin.result().settings["n"] == [n]
    assert len(twin.twin._blocks) == 1


def test_lightning_contradictions():
    for options, text in (
        ({"clip_norm": 3.0}, "clip_norm=3.0 was given to LightningBootstrap, but the trainer does not clip so"),
        ({"n": 3}, "n=3 was given to LightningBootstrap, but the trainer has 44"),
        ({"steps": 3}, "steps=3 was given to LightningBootstrap, but the trainer has 18"),
        ({"batch_size": 16}, "batch_size=16 was given to LightningBootstrap, but the trainer has 8"),
    ):
        with pytest.raises(InvalidInput, match=text):
            fit(build(Module, 0), options=options)
    with pytest.raises(InvalidInput, match=r"the trainer has 0\.1"):
        fit(build(Module, 0), options={"clip_norm": 3.0}, gradient_clip_val=0.1)


def test_lightning_loss_is_checked_on_the_first_batch():
    with pytest.raises(InvalidInput, match=r"training_step had a loss of .* but the twin's on it is"):
        fit(build(lambda: Module(smoothing=0.1), 0))

    def smoothed(outputs, y):
        return F.cross_entropy(outputs, y, label_smoothing=0.1)

    assert close(fit(build(lambda: Module(smoothing=0.1), 0), options={"loss": smoothed}))
    fit(build(lambda: Module(dropout=0.5), 0))  # the same dropout is drawn for the check
    x, y = data(16)
    pairs = DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], batch_size=B)

    class Named(Module):
        def training_step(self, batch, index):
            return super().training_step((batch["x"], batch["y"]), index)

    with pytest.raises(InvalidInput, match="are not its first two parts; pass batch="):
        fit(build(Named, 0), 16, pairs)
    assert close(fit(build(Named, 0), 16, pairs, {"batch": lambda b: (b["x"], b["y"])}))
    fit(build(lambda: Module(smoothing=0.1), 0), options={"batch": None})


class Unfreezes(Module):
    """The first layer joins training, and the optimizer, in the second epoch."""

    def __init__(self):
        super().__init__()
        self.net[1].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.3, momentum=0.9)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[1].requires_grad_(True)
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[1].parameters()), "lr": 0.1})


class Freezes(Module):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[1].requires_grad_(False)


class KeepsStatistics(Module):
    """Batch norm stays in evaluation mode, as Lightning leaves it; its statistics are not the batch's."""

    def __init__(self):
        super().__init__()
        self.net[2].eval()


@pytest.mark.parametrize("cls", [Unfreezes, Freezes, KeepsStatistics])
def test_lightning_follows_what_is_frozen(cls):
    assert close(fit(build(cls, 0)))


def test_lightning_skipped_batches_are_skipped():
    class Skips(Module):
        def training_step(self, batch, index):
            return None if index in (1, 4) else super().training_step(batch, index)

    twin = fit(build(Skips, 0), 48)
    assert close(twin)


def test_lightning_gradients_are_checked_in_the_first_update():
    class Scales(Module):
        def on_after_backward(self):
            for p in self.parameters():
                p.grad.mul_(0.1)

    class Clips(Module):
        def on_before_optimizer_step(self, optimizer):
            nn.utils.clip_grad_norm_(self.parameters(), 0.05)

    class Backward(Module):
        def backward(self, loss):
            (0.1 * loss).backward()

    class Hooked(Module):
        def __init__(self):
            super().__init__()
            for p in self.parameters():
                p.register_hook(lambda g: g.clamp(-0.003, 0.003))

    for cls in (Scales, Clips, Backward, Hooked):
        for settings in ({}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}):
            says = f"a hook of {cls.__name__} or of its parameters changes them|a hook on the parameter .* changes its"
            with pytest.raises(InvalidInput, match=says):
                fit(build(cls, 0), 48, **settings)

    class Logs(Module):  # a hook that only looks
        def on_before_optimizer_step(self, optimizer):
            self.norm = sum(p.grad.norm() for p in self.parameters())

    assert close(fit(build(Logs, 0), 48, accumulate_grad_batches=3, gradient_clip_val=0.1))


def test_lightning_gradients_that_are_not_cleared_are_refused():
    class Hidden(Module):
        def optimizer_zero_grad(self, *args):
            pass

    for settings in ({}, {"accumulate_grad_batches": 2}):
        with pytest.raises(InvalidInput, match="not cleared before the backward pass of update 2"):
            fit(build(Hidden, 0), 48, **settings)

    class Zeros(Module):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

    assert close(fit(build(Zeros, 0), 48))


def test_lightning_refuses_what_it_cannot_read():
    class Manual(Module):
        automatic_optimization = False

    class Clips(Module):
        def configure_gradient_clipping(self, *args, **kwargs):
            pass

    class Two(Module):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    with pytest.raises(InvalidInput, match="Clips overrides configure_gradient_clipping"):
        fit(Clips())
    for cls, text in ((Manual, "Manual optimizes manually"), (Two, "2 optimizers")):
        module = cls()
        module.automatic_optimization = False
        with pytest.raises(InvalidInput, match=text):
            fit(module)
    with pytest.raises(InvalidInput, match="nothing was measured yet"):
        LightningBootstrap(Replay(*data(8), 8)).result()


# ---- Hugging Face ----


class Named(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "labels": self.y[i]}


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class Own(nn.Module):
    """A network that gets no number of items, with batch norm: it tells micro-batches from whole ones."""

    def __init__(self, weight=None):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.weight = weight

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=self.weight)
        return {"loss": loss, "logits": logits}


class Forgetful(Own):
    """It is told the number of items and does not use it, so that the Trainer adds up accumulated means."""

    def forward(self, pixel_values, labels=None, **kwargs):
        return super().forward(pixel_values, labels)


def vit():
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def train(model_fn, tmp_path, n=44, options=None, callbacks=(), **settings):
    x, y = data(n)
    twin = HuggingFaceBootstrap(
        Replay(x, y, B * settings.get("gradient_accumulation_steps", 1)),
        test_size=50,
        forward=lambda model, x: model(pixel_values=x)["logits"],
        **(options or {}),
    )
    usual = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(
        str(tmp_path),
        **{"per_device_train_batch_size": B, "num_train_epochs": 3, "learning_rate": 0.02, **usual, **settings},
    )
    InOrder(model=build(model_fn, 0), args=arguments, train_dataset=Named(x, y), callbacks=[twin, *callbacks]).train()
    return twin


@pytest.mark.parametrize(
    "settings",
    [
        {},  # clips to norm 1
        {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.5},
        {"max_grad_norm": 0.05, "optim": "sgd", "learning_rate": 0.5},
        {"gradient_accumulation_steps": 4, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"bf16": True},
    ],
)
@pytest.mark.parametrize("model_fn", [Own, vit])
def test_transformers(model_fn, settings, tmp_path):
    twin = train(model_fn, tmp_path, **settings)
    assert close(twin)
    assert twin.twin.clip_norm == (settings.get("max_grad_norm", 1.0) or None)


def test_transformers_smooths_labels(tmp_path):
    twin = train(vit, tmp_path, label_smoothing_factor=0.2, gradient_accumulation_steps=2)
    assert close(twin)
    z = torch.tensor([[3.0, 0.0, 0.0]])
    assert float(twin.twin.training_loss(z, torch.tensor([0]))) > float(F.cross_entropy(z, torch.tensor([0])))


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_models_that_forget_the_number_of_items(tmp_path, bf16):
    """The Trainer then adds up the means of accumulated batches instead of averaging them; so does the twin."""
    twin = train(
        Forgetful,
        tmp_path,
        48,
        gradient_accumulation_steps=3,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0,
        bf16=bf16,
    )
    assert twin._whole == 3
    assert close(twin)


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_loss_is_checked_in_the_first_update(tmp_path, bf16):
    weight = torch.tensor([1.0, 3.0, 0.2])
    with pytest.raises(InvalidInput, match="the loss that the Trainer minimizes is not the twin's"):
        train(lambda: Own(weight), tmp_path, bf16=bf16)

    def weighed(outputs, y):
        return F.cross_entropy(outputs, y, weight=weight)

    assert close(train(lambda: Own(weight), tmp_path, options={"loss": weighed}, bf16=bf16))


def halves(p):
    p.grad.mul_(0.5)


@pytest.mark.parametrize("how", ["hook", "post hook", "in the step", "looks"])
def test_transformers_gradients_that_something_changes_are_refused(how, tmp_path):
    def model_fn():
        model = vit()
        for p in model.parameters():
            if how == "hook":
                p.register_hook(lambda g: g.clamp(-1e-4, 1e-4))
            elif how == "post hook":
                p.register_post_accumulate_grad_hook(halves)
            elif how == "looks":
                p.register_hook(lambda g: print(end=""))
        return model

    class Scales(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for p in model.parameters():
                p.grad.mul_(0.5)

    options = {"callbacks": [Scales()]} if how == "in the step" else {}
    if how == "looks":
        train(model_fn, tmp_path)
        return
    with pytest.raises(InvalidInput, match=r"are not those that backward gave|changes its gradient"):
        train(model_fn, tmp_path, **options)


def test_transformers_contradictions(tmp_path):
    for options, text in (
        ({"clip_norm": 3.0}, "clip_norm=3.0 was given to HuggingFaceBootstrap, but the trainer has 1.0"),
        ({"n": 3}, "n=3 was given to HuggingFaceBootstrap, but the trainer has 44"),
        ({"batch_size": 16}, "batch_size=16 was given to HuggingFaceBootstrap, but the trainer has 8"),
    ):
        with pytest.raises(InvalidInput, match=text):
            train(Own, tmp_path, options=options)
    for arguments, text in (
        ({"n_gpu": 0, "fsdp": ["full_shard"]}, "DeepSpeed and FSDP"),
        ({"n_gpu": 2}, "several GPUs"),
    ):
        with pytest.raises(InvalidInput, match=text):
            transformers_settings(SimpleNamespace(**arguments), None)
