"""The linear theory, implied losses, and the trainers' callbacks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlcollage.errors import InvalidInput
from mlcollage.papers.synthetic_gradients import (
    HuggingFaceSyntheticGradients,
    LightningSyntheticGradients,
    SyntheticGradient,
    implied_loss,
    linear_sg_convergence,
)


def problem(d, seed=0, n=200):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    clean = x @ torch.randn(d, generator=g, dtype=torch.float64) / d**0.5
    noise = torch.randn(n, generator=g, dtype=torch.float64)
    return x, clean + 0.1 * noise, (clean + 0.5 * noise > 0).double()


def test_the_linear_theorem():
    x, y, classes = problem(2)
    found = linear_sg_convergence(x, y, steps=3000)
    assert abs(found.final_gap) <= 1e-12
    np.testing.assert_allclose(found.weights, (1, -1, 0), atol=1e-6)
    log = linear_sg_convergence(x, classes, loss="log", steps=3000)
    assert log.final_gap > 1e-6 > abs(found.final_gap)
    blind = linear_sg_convergence(x, y, label=False, steps=1500)
    assert blind.final_gap > 0.01
    np.testing.assert_allclose(blind.weights, 0, atol=1e-4)


def test_the_linear_theorem_of_a_deep_network():
    x, y, _ = problem(2)
    assert abs(linear_sg_convergence(x, y, depth=10, lr=0.01, steps=4000).final_gap) <= 1e-12


def test_degenerate_regressions_still_close_the_gap():
    x, y, _ = problem(3, n=2)  # fewer rows than columns
    x = torch.cat([x, x])  # duplicate rows
    x[:, 2] = 1.0  # a constant column
    assert abs(linear_sg_convergence(x, torch.cat([y, y]), steps=4000).final_gap) <= 1e-12
    with pytest.raises(InvalidInput, match="0 or 1"):
        linear_sg_convergence(x, torch.cat([y, y]), loss="log")


def test_the_implied_loss_of_a_linear_synthesizer_is_quadratic():
    made = SyntheticGradient(3, 2).double()
    a = torch.tensor([[2.0, 0.5, 0], [0.5, 1.0, 0], [0, 0, 3.0]], dtype=torch.float64)
    with torch.no_grad():
        made.layers[0].weight.copy_(torch.cat([a, torch.zeros(3, 2)], 1))
        made.layers[0].bias.copy_(torch.tensor([1.0, 0, 0]))
    e = torch.eye(3, dtype=torch.float64)
    context = torch.eye(2, dtype=torch.float64)[0]
    found = implied_loss(made, torch.zeros(3, dtype=torch.float64), (e[0], e[1]), context)
    u, v = found.u[:, None], found.v[None]
    np.testing.assert_allclose(found.values, u + u**2 + 0.5 * u * v + 0.5 * v**2, atol=1e-12)
    assert found.asymmetry == 0
    with torch.no_grad():
        made.layers[0].weight[0, 1] = -0.5
    assert implied_loss(made, torch.zeros(3, dtype=torch.float64), (e[0], e[1]), context).asymmetry > 0.1


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=g)
    return x, x[:, :3].argmax(1)


def test_lightning_trains_with_cuts():
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def training_step(self, batch, index):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(*callbacks):
        module = Module()
        options = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(max_epochs=2, callbacks=list(callbacks), enable_model_summary=False, **options)
        trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=16))
        return module

    cut = LightningSyntheticGradients(["1"], 3, divisor="samples", model=lambda m: m.net)
    module, plain = train(cut), train()
    exact = train(LightningSyntheticGradients(["1"], 3, divisor="samples", lam=1.0, model=lambda m: m.net))
    assert torch.equal(exact.net[0].weight, plain.net[0].weight)
    assert not torch.equal(module.net[0].weight, plain.net[0].weight)
    assert cut.net.steps == 8
    assert "training_step" not in module.__dict__
    assert set(cut.state_dict()) == {"synthesizers", "optimizer"}


def test_transformers_trains_with_cuts(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)

        def forward(self, x=None, labels=None):
            logits = self.head(self.body(x))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": a, "labels": b} for a, b in zip(*data(), strict=True)]

    def train(*callbacks):
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=16, report_to=[], use_cpu=True,
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, seed=0,
        )  # fmt: skip
        model = Model()
        transformers.Trainer(model, args, train_dataset=rows, callbacks=list(callbacks)).train()
        return model

    cut = HuggingFaceSyntheticGradients(["body"], 3, divisor="samples")
    model, plain = train(cut), train()
    exact = train(HuggingFaceSyntheticGradients(["body"], 3, divisor="samples", lam=1.0))
    torch.testing.assert_close(exact.body[0].weight, plain.body[0].weight)
    assert not torch.allclose(model.body[0].weight, plain.body[0].weight)
    assert cut.net.steps == 6
    assert not model._forward_hooks


def test_a_trainers_loss_must_be_described():
    with pytest.raises(InvalidInput, match="divisor='samples'"):
        LightningSyntheticGradients(["net.1"], 3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"world_size": 2, "precision": "32-true"}, "synthesizers of its own; train on one"),
        ({"world_size": 1, "precision": "16-mixed"}, "float16 scales the loss"),
    ],
)
def test_lightning_on_several_devices_is_refused(settings, sentence):
    pytest.importorskip("lightning.pytorch")
    with pytest.raises(InvalidInput, match=sentence):
        LightningSyntheticGradients(["0"], 3, divisor="samples").on_fit_start(SimpleNamespace(**settings), None)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"fp16": False, "n_gpu": 2, "world_size": 1}, "synthesizers of its own; train on one"),
        ({"fp16": False, "n_gpu": 1, "world_size": 2}, "synthesizers of its own; train on one"),
        ({"fp16": True, "n_gpu": 1, "world_size": 1}, "fp16 scales the loss"),
    ],
)
def test_transformers_on_several_devices_is_refused(settings, sentence):
    pytest.importorskip("transformers")
    callback = HuggingFaceSyntheticGradients(["body"], 3, divisor="samples")
    with pytest.raises(InvalidInput, match=sentence):
        callback.on_train_begin(SimpleNamespace(**settings), None, None, model=nn.Linear(2, 2))
