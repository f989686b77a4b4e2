"""The gauge in Lightning and in the Hugging Face Trainer."""

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from mlcollage.nn import build
from mlcollage.papers.barlow_twins import BarlowTwins, BarlowTwinsLoss, HuggingFaceLossGauge, LightningLossGauge
from mlcollage.train import LARS


def data(n=64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g)
    return x + 0.3 * torch.randn(n, 4, generator=g), x + 0.3 * torch.randn(n, 4, generator=g)


def twins():
    return build(lambda: BarlowTwins(nn.Linear(4, 6), loss=BarlowTwinsLoss(0.02)), 0)


class Module(lightning.LightningModule):
    def __init__(self, lars=False):
        super().__init__()
        self.model, self.lars = twins(), lars

    def training_step(self, batch, index):
        return self.model(batch)

    def configure_optimizers(self):
        return LARS(self.parameters(), lr=0.1) if self.lars else torch.optim.SGD(self.parameters(), lr=0.01)


def fit(tmp_path, callback, **settings):
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **settings,
    )
    module = Module(lars="gradient_clip_val" in settings)
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=16))
    return trainer, module


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_logs_where_the_loss_stands(tmp_path):
    callback = LightningLossGauge(every=2)
    trainer, module = fit(tmp_path, callback)
    assert [r.step for r in callback.gauge.history] == [1, 2, 3, 4]
    assert float(trainer.callback_metrics["barlow/floor"]) == 0.0
    assert float(trainer.callback_metrics["barlow/loss"]) == pytest.approx(callback.gauge.last.loss, rel=1e-5)
    assert not module.model.loss._forward_hooks


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_clipping_under_lars_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="clipped under LARS"):
        fit(tmp_path, LightningLossGauge(), gradient_clip_val=1.0)


class ForTrainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = twins()

    def forward(self, x_a, x_b):
        return {"loss": self.model(x_a, x_b)}


class Dicts(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        a, b = data()
        return {"x_a": a[i], "x_b": b[i]}


def test_the_trainer_logs_where_the_loss_stands(tmp_path):
    callback = HuggingFaceLossGauge(every=1)
    model = ForTrainer()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        num_train_epochs=1,
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Dicts(), callbacks=[callback])
    trainer.train()
    assert [r.step for r in callback.gauge.history] == [1, 2, 3, 4]
    logged = [entry for entry in trainer.state.log_history if "barlow/efficiency" in entry]
    assert logged
    assert not model.model.loss._forward_hooks
    optimizer = LARS(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="clipped under LARS"):
        callback.on_train_begin(arguments, None, None, model=model, optimizer=optimizer)
