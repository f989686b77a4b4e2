"""Lightning and Hugging Face, with the real trainers, give what the plain loop gives."""

import logging

import lightning
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlcollage.errors import InvalidInput
from mlcollage.papers.neural_mechanics.callbacks import HuggingFaceConservation, LightningConservation
from mlcollage.papers.neural_mechanics.symmetry import Symmetry, SymmetrySet
from mlcollage.papers.neural_mechanics.term import Term
from mlcollage.papers.neural_mechanics.tracker import ConservationTracker

LAWS = SymmetrySet(
    (
        Symmetry(
            "rescale", "hidden", (Term("0.weight", 1, keep=0), Term("0.bias", keep=0), Term("2.weight", -1, keep=1)), 6
        ),
        Symmetry("translation", "softmax", (Term("2.weight", keep=1),), 6),
    )
)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def data(n=40):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def plain(epochs, clip=None):
    """The loop that both trainers run: batches of 8 in order, SGD with momentum and decay."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    x, y = data()
    with ConservationTracker(model, optimizer, LAWS) as tracker:
        for _ in range(epochs):
            for i in range(0, len(x), 8):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[i : i + 8]), y[i : i + 8]).backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
    return tracker.result()


class Module(lightning.LightningModule):
    def __init__(self, optimizers=1):
        super().__init__()
        self.net, self.count = network(), optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        make = [
            torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for _ in range(self.count)
        ]
        return make if self.count > 1 else make[0]


def fit(module, callback, folder, epochs=2, checkpoint=None, **more):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **more,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=8), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("clip", [None, 0.5])
def test_lightning_gives_what_the_plain_loop_gives(tmp_path, clip):
    module = Module()
    callback = LightningConservation(LAWS, module.net)
    fit(module, callback, tmp_path, gradient_clip_val=clip)
    found, expected = callback.result(), plain(2, clip)
    assert (found["rel"] < 1e-12).all()
    for column in ("measured", "predicted", "weight_decay", "momentum"):
        np.testing.assert_allclose(found[column], expected[column], atol=1e-13)
    assert callback.tracker.steps == 10


def test_lightning_checkpoints_hold_the_tracker(tmp_path):
    module = Module()
    callback = LightningConservation(LAWS, module.net)
    fit(module, callback, tmp_path, epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    again = Module()
    second = LightningConservation(LAWS, again.net)
    second.load_state_dict(callback.state_dict())  # as Lightning does for a callback of the same key
    fit(again, second, tmp_path, epochs=2, checkpoint=str(tmp_path / "one.ckpt"))
    found, expected = second.result(), plain(2)
    np.testing.assert_allclose(found["predicted"], expected["predicted"], atol=1e-13)
    assert found["step"].max() == 10


def test_two_optimizers_are_refused_with_the_way_out(tmp_path):
    module = Module(optimizers=2)
    with pytest.raises(InvalidInput, match="2 optimizers"):
        fit(module, LightningConservation(LAWS, module.net), tmp_path)


class Classifier(nn.Module):
    """What the Hugging Face trainer wants: keyword arguments in, a loss out."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        x, y = data()
        return {"x": x[i], "labels": y[i]}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("own_optimizer", [True, False])
def test_the_hugging_face_trainer_gives_what_the_plain_loop_gives(tmp_path, own_optimizer):
    model = Classifier()
    callback = HuggingFaceConservation(LAWS, model.net)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        max_grad_norm=0.0, save_strategy="no", disable_tqdm=True, logging_strategy="no", weight_decay=0.01,
        learning_rate=0.01,
    )  # fmt: skip
    optimizers = (None, None)
    if own_optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        optimizers = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0))
    InOrder(model, arguments, train_dataset=Rows(), callbacks=[callback], optimizers=optimizers).train()
    found = callback.result()
    assert (found["rel_accounted"] < 1e-12).all()
    assert found["step"].max() == 10
    if own_optimizer:
        np.testing.assert_allclose(found["predicted"], plain(2)["predicted"], atol=1e-12)
    else:  # its AdamW decays weights but not biases: two groups inside one law
        assert found["preconditioner"].abs().max() > 1e-4
        assert found["weight_decay"].abs().max() > 0


def test_a_result_before_training_is_refused():
    with pytest.raises(InvalidInput, match="nothing was measured"):
        LightningConservation(LAWS).result()


def test_lightning_gradients_are_unscaled_by_the_trainer_s_own_scaler(tmp_path):
    """Nothing is clipped, so nothing may show as clipped, although raw gradients are 65,536 times too large."""
    scaler = torch.amp.GradScaler("cpu")
    precision = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    callback = LightningConservation(LAWS, clipping=True)
    module = Module()
    callback.model = module.net
    fit(module, callback, tmp_path, 1, plugins=[precision])
    assert callback.tracker.scaler is scaler
    clipped = callback.result()["clipping"].abs()
    assert scaler.get_scale() > 1000
    assert clipped.max() < 1e-2 * callback.result()["change"].abs().max()


def test_raw_gradients_of_several_processes_are_refused():
    callback = LightningConservation(LAWS, clipping=True)
    model = network()
    with pytest.raises(InvalidInput, match="of 2 processes are not yet averaged"):
        callback._begin(model, torch.optim.SGD(model.parameters(), lr=0.1), None, 2)
