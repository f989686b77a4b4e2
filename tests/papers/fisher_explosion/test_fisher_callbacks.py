"""Tracker and penalty in real Lightning and Hugging Face trainings, against loops written out by hand."""

import copy
import pickle
import sys
import warnings

import lightning.pytorch as lightning
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.modeling_outputs import SequenceClassifierOutput

from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.nn.init import build
from mlcollage.papers.fisher_explosion import (
    FisherPenalty,
    FisherTraceTracker,
    HuggingFaceFisherTrace,
    HuggingFaceFisherTrainer,
    LightningFisherPenalty,
    LightningFisherTrace,
)
from mlcollage.train.callbacks import _joined

BATCH, STEPS = 8, 6


def data(n=BATCH * STEPS):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=g)
    return x, x[:, :3].argmax(1)


def network():
    return build(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), 0)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(steps=STEPS, **settings):
    """The loop that the trainers run: SGD over the batches in order."""
    model, (x, y) = network(), data()
    penalty = FisherPenalty(model, 0.3, interval=2, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(steps):
        part = slice(t * BATCH, (t + 1) * BATCH)
        optimizer.zero_grad()
        logits = model(x[part])
        loss = F.cross_entropy(logits, y[part])
        if penalty.mode == "double_backprop":
            (loss + penalty(logits)).backward()
        else:
            loss.backward()
            penalty.add_gradient_(lambda part=part: model(x[part]))
        optimizer.step()
    return model


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, callbacks, folder, *, steps=STEPS, checkpoint=None, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
            callbacks=callbacks,
            **settings,
        )
        trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=BATCH), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("mode", ["jvp", "finite_difference"])
def test_lightning_adds_the_penalty_before_each_update(tmp_path, mode):
    module = Module()
    penalty = FisherPenalty(module.net, 0.3, mode=mode, interval=2)
    fit(module, [LightningFisherPenalty(penalty)], tmp_path)
    assert torch.equal(flat(module.net), flat(by_hand(mode=mode)))
    assert penalty.steps == STEPS
    assert not torch.allclose(flat(module.net), flat(by_hand(start=99)), atol=1e-4)


def test_lightning_adds_it_after_unscaling_and_once_for_accumulated_batches(tmp_path):
    module = Module()
    penalty = FisherPenalty(module.net, 0.3, mode="jvp", interval=1)
    fit(module, [LightningFisherPenalty(penalty)], tmp_path, steps=2, accumulate_grad_batches=3)
    assert penalty.steps == 2


def test_lightning_checkpoints_hold_the_steps_and_the_history(tmp_path):
    def parts():
        module = Module()
        penalty = FisherPenalty(module.net, 0.3, mode="jvp", interval=2)
        tracker = LightningFisherTrace(data(), every=2)
        return module, penalty, tracker, [LightningFisherPenalty(penalty), tracker]

    first, _, half, callbacks = parts()
    trainer = fit(first, callbacks, tmp_path, steps=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, penalty, tracker, callbacks = parts()
    fit(second, callbacks, tmp_path, checkpoint=tmp_path / "half.ckpt")
    assert penalty.steps == STEPS
    assert tracker.history["step"].tolist() == [1, 2, 4, 6]
    assert tracker.history.head(2).equals(half.history)


def test_lightning_tracker_measures_logs_and_changes_nothing(tmp_path):
    plain, watched = Module(), Module()
    fit(plain, [], tmp_path)
    tracker = LightningFisherTrace(data()[0], every=2, loss_threshold=1.0)
    assert isinstance(tracker, lightning.Callback)
    assert isinstance(tracker, FisherTraceTracker)
    trainer = fit(watched, [tracker], tmp_path)
    assert tracker.history["step"].tolist()[:3] == [1, 2, 4]
    assert torch.equal(flat(plain.net), flat(watched.net))
    assert trainer.logged_metrics["fisher_trace"] == pytest.approx(tracker.history["trace"].iloc[-1])


def test_lightning_threshold_is_of_the_loss_and_not_of_its_share_in_an_accumulated_update(tmp_path):
    tracker = LightningFisherTrace(data()[0], every=50, loss_threshold=0.5)
    fit(Module(), [tracker], tmp_path, steps=2, accumulate_grad_batches=3)  # the loss is near log 3
    assert tracker.step_at_threshold is None


@pytest.mark.parametrize("kind", [LightningFisherTrace, HuggingFaceFisherTrace])
def test_traces_go_to_other_processes_with_what_they_measured(kind):
    trace = kind(data(), every=5, method="exact")
    trace.update(network(), 0)
    there = pickle.loads(pickle.dumps(trace))  # noqa: S301 (our own bytes)
    there.update(network(), 5)
    assert there.history["step"].tolist() == [0, 5]
    assert there.history["trace"].nunique() == 1


def test_lightning_cannot_take_double_backprop():
    with pytest.raises(InvalidInput, match="training_step"):
        LightningFisherPenalty(FisherPenalty(network(), 0.1))


class Classifier(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.net = network()
        self.post_init()

    def _init_weights(self, module):
        """The network is initialized already."""

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def train(model, folder, penalty=None, callbacks=(), resume=None, make=HuggingFaceFisherTrainer, **settings):
    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 0.1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "train_sampling_strategy": "sequential",
            **settings,
        },
    )
    given = {"model": model, "args": arguments, "train_dataset": rows, "callbacks": list(callbacks)}
    trainer = transformers.Trainer(**given) if penalty is None else make(**given, penalty=penalty)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def classifier():
    return Classifier(transformers.PretrainedConfig())


@pytest.mark.parametrize("mode", ["double_backprop", "jvp", "finite_difference"])
def test_the_transformers_trainer_trains_the_penalized_loss(tmp_path, mode):
    model = classifier()
    penalty = FisherPenalty(model, 0.3, mode=mode, interval=2)
    train(model, tmp_path, penalty)
    torch.testing.assert_close(flat(model.net), flat(by_hand(mode=mode)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["double_backprop", "jvp"])
def test_accumulated_micro_batches_are_averaged(tmp_path, mode):
    """With labels='true', three micro-batches of eight give the mean of their penalties' gradients."""
    model, reference = classifier(), network()
    penalty = FisherPenalty(model, 0.3, mode=mode, labels="true", interval=1)
    train(model, tmp_path, penalty, max_steps=1, gradient_accumulation_steps=3)
    x, y = data()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for t in range(3):
        part = slice(t * BATCH, (t + 1) * BATCH)
        logits = reference(x[part])
        by = FisherPenalty(reference, 0.3, labels="true", interval=1)
        ((F.cross_entropy(logits, y[part]) + by(logits, y=y[part])) / 3).backward()
    optimizer.step()
    torch.testing.assert_close(flat(model.net), flat(reference), rtol=0, atol=1e-6)
    assert penalty.accumulation_steps == 3


def test_resumed_transformers_training_is_the_unbroken_one(tmp_path):
    def make():
        model = classifier()
        return model, FisherPenalty(model, 0.3, interval=2)

    whole, penalty = make()
    train(whole, tmp_path / "a", penalty)
    first, penalty = make()
    train(first, tmp_path / "b", penalty, max_steps=3, save_strategy="steps", save_steps=3)
    second, penalty = make()
    train(second, tmp_path / "c", penalty, resume=str(tmp_path / "b" / "checkpoint-3"))
    torch.testing.assert_close(flat(second.net), flat(whole.net), rtol=0, atol=1e-7)


def test_evaluation_has_no_penalty(tmp_path):
    model = classifier()
    penalty = FisherPenalty(model, 0.3, interval=1)
    trainer = train(model, tmp_path, penalty, max_steps=1)
    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    found = trainer.evaluate(rows)["eval_loss"]
    assert found == pytest.approx(F.cross_entropy(model.net(x), y).item(), rel=1e-4)
    assert penalty.steps == 1


def test_the_transformers_tracker_measures_and_changes_nothing(tmp_path):
    plain, watched = classifier(), classifier()
    train(plain, tmp_path)
    x, y = data()
    tracker = HuggingFaceFisherTrace({"x": x, "labels": y}, every=2, loss_threshold=1.05)
    before = copy.deepcopy(watched.state_dict())
    train(watched, tmp_path, callbacks=[tracker])
    assert tracker.history["step"].tolist() == [1, 2, 4, 6]
    assert {"loss", "accuracy"} <= set(tracker.history.columns)
    assert torch.equal(flat(plain.net), flat(watched.net))
    assert not torch.equal(flat(watched.net), torch.cat([v.flatten() for v in before.values()]))


def test_a_trainer_of_ones_own_can_be_extended(tmp_path):
    seen = []

    class Mine(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            seen.append(self.penalty.steps)
            return super().compute_loss(*args, **kwargs)

    class Both(HuggingFaceFisherTrainer, Mine):
        pass

    model = classifier()
    trainer = train(model, tmp_path, FisherPenalty(model, 0.3, interval=2), make=Both)
    assert type(trainer) is Both
    assert len(seen) == STEPS
    torch.testing.assert_close(flat(model.net), flat(by_hand()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda: LightningFisherTrace(data()[0]), "lightning"),
        (lambda: LightningFisherPenalty(FisherPenalty(network(), 0.1, mode="jvp")), "lightning"),
        (lambda: HuggingFaceFisherTrace(data()[0]), "transformers"),
        (lambda: HuggingFaceFisherTrainer(penalty=FisherPenalty(network(), 0.1)), "transformers"),
    ],
)
def test_a_missing_trainer_is_named(monkeypatch, make, extra):
    for package in ("lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    _joined.cache_clear()
    with pytest.raises(MissingDependency, match=rf"mlcollage\[{extra}\]"):
        make()


def test_lightning_names_the_parts_of_a_batch():
    """Of (x, mask, y) the second part was taken for the labels."""
    model = build(lambda: nn.Linear(4, 3), seed=0)
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    gradients = []
    for batch, parts in (
        ((x, y), None),
        ((x, torch.zeros(12).long(), y), ("x", "_", "y")),
        ({"x": x, "labels": y}, None),
    ):
        model.zero_grad()
        penalty = FisherPenalty(model, 0.1, labels="true", mode="jvp", interval=1)
        F.cross_entropy(model(x), y).backward()
        callback = LightningFisherPenalty(penalty, parts=parts)
        callback.on_train_batch_start(None, model, batch, 0)
        callback.on_before_optimizer_step(None, model, None)
        gradients.append(model.weight.grad.clone())
    assert all(torch.equal(g, gradients[0]) for g in gradients)
    callback = LightningFisherPenalty(penalty)
    callback.on_train_batch_start(None, model, (x, y, y), 0)
    with pytest.raises(InvalidInput, match="has 3 parts, of which only inputs and targets"):
        callback.on_before_optimizer_step(None, model, None)
