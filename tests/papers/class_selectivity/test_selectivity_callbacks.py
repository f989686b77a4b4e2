"""The callbacks against the real Lightning and the real Hugging Face Trainer: tiny runs, compared with plain loops."""

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlcollage.errors import InvalidInput
from mlcollage.nn.init import seeded
from mlcollage.papers.class_selectivity import HuggingFaceSelectivity, LightningSelectivity, SelectivityRegularizer


def network():
    with seeded(0):
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def by_hand(blobs, alpha, steps, lr=0.1, batch=60):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with SelectivityRegularizer(model, alpha) as penalty:
        for x, y in list(DataLoader(TensorDataset(*blobs), batch_size=batch))[:steps]:
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + penalty(y)).backward()
            optimizer.step()
    return model


def assert_same_weights(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("as_dictionary", [True, False])
def test_lightning(blobs, tmp_path, as_dictionary):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            return {"loss": loss} if as_dictionary else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = LightningSelectivity(-2.0, model=lambda module: module.net)
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning has advice on workers and loggers
        trainer = pl.Trainer(
            max_steps=4,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader(TensorDataset(*blobs), batch_size=60))
    assert_same_weights(module.net, by_hand(blobs, -2.0, 4))
    assert 0 < float(trainer.callback_metrics["selectivity"]) < 1
    assert callback.regularizer.steps == 4
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.net.modules())


class Classifier(nn.Module):
    """What the Trainer asks of a model: it computes its own loss."""

    def __init__(self, as_tuple=False):
        from transformers import PretrainedConfig

        super().__init__()
        self.net, self.as_tuple, self.config = network(), as_tuple, PretrainedConfig()

    def forward(self, x, labels=None):
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = self.net(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return (loss, logits) if self.as_tuple else SequenceClassifierOutput(loss=loss, logits=logits)


def trainer_for(model, callback, blobs, folder, **options):
    from transformers import Trainer, TrainingArguments

    x, y = blobs
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 60,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder(
        model,
        TrainingArguments(**{**arguments, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[callback],
    )


@pytest.mark.parametrize(
    ("as_tuple", "options"), [(False, {}), (True, {}), (False, {"per_device_train_batch_size": 30})]
)
def test_transformers(blobs, tmp_path, as_tuple, options):
    callback = HuggingFaceSelectivity(-2.0, "net.1")
    model = Classifier(as_tuple)
    state = torch.get_rng_state()
    trainer = trainer_for(model, callback, blobs, tmp_path, **options)
    trainer.train()
    size = options.get("per_device_train_batch_size", 60)
    assert_same_weights(model.net, by_hand(blobs, -2.0, 4, batch=size))
    assert callback.regularizer.steps == 4
    assert not model._forward_hooks
    plain = F.cross_entropy(model.net(blobs[0]), blobs[1])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(plain.detach()), rel=1e-4)
    torch.set_rng_state(state)


def test_accumulated_gradients_weigh_the_term_once(blobs, tmp_path):
    """Two halves accumulated are, for equal terms, one step with the mean of their gradients."""
    model = Classifier()
    trainer_for(
        model,
        HuggingFaceSelectivity(-2.0, "net.1"),
        blobs,
        tmp_path,
        per_device_train_batch_size=30,
        gradient_accumulation_steps=2,
        max_steps=2,
    ).train()
    expected = network()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    batches = iter(DataLoader(TensorDataset(*blobs), batch_size=30))
    with SelectivityRegularizer(expected, -2.0) as penalty:
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                x, y = next(batches)
                ((F.cross_entropy(expected(x), y) + penalty(y)) / 2).backward()
            optimizer.step()
    assert_same_weights(model.net, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_transformer_of_theirs(tmp_path, accumulate):
    """One SGD step with and without the term differ by the gradient of the terms, each of the weight of its loss."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    g = torch.Generator().manual_seed(0)
    ids, y = torch.randint(20, (48, 5), generator=g), torch.arange(48) % 3
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, y, strict=True)]

    def fresh():
        with seeded(0):
            return BertForSequenceClassification(config)

    def after_a_step(alpha):
        model, callback = fresh(), HuggingFaceSelectivity(alpha, "*intermediate_act_fn", negative="relu")
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=48 // accumulate,
            gradient_accumulation_steps=accumulate,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )

        class InOrder(Trainer):
            def _get_train_sampler(self, *args):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        InOrder(model, arguments, train_dataset=rows, callbacks=[callback]).train()
        return model

    model = fresh().train()
    with SelectivityRegularizer(model, -2.0, "*intermediate_act_fn", negative="relu") as penalty:
        for part in torch.arange(48).split(48 // accumulate):
            model(ids[part])
            penalty(y[part]).backward()  # this model does not divide by num_items_in_batch, so mean losses add up
    assert len(penalty.last) == 2
    for (name, p), a, b in zip(
        model.named_parameters(), after_a_step(-2.0).parameters(), after_a_step(0.0).parameters(), strict=True
    ):
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(b.detach() - a.detach(), expected, atol=2e-6, rtol=1e-3, msg=name)


GROUPS = [[8, 8, 8], [8, 4]]  # 36 samples in batches of 8, three of which make an update: both ends are short


def accumulated_by_hand(model, call, x, y, weights, **options):
    """Two updates, each with its micro-batches weighed so."""
    optimizer, batches = torch.optim.SGD(model.parameters(), lr=0.1), zip(x.split(8), y.split(8), strict=True)
    with SelectivityRegularizer(model, -2.0, **options) as penalty:
        for sizes in GROUPS:
            optimizer.zero_grad()
            for size in sizes:
                a, b = next(batches)
                (weights(size, sizes) * (F.cross_entropy(call(model, a), b) + penalty(b))).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("divides", [True, False])
def test_a_short_last_group_of_the_trainer_weighs_as_the_loss(divides, blobs, tmp_path):
    class Told(Classifier):
        """One that is told the number of items, and divides by it, or, as some of theirs, does not."""

        def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
            output = super().forward(x, labels)
            if divides and num_items_in_batch is not None:
                output.loss = output.loss * len(labels) / num_items_in_batch
            return output

    (x, y), model, seen = (part[:36] for part in blobs), Told(), []
    trainer = trainer_for(
        model, HuggingFaceSelectivity(-2.0, "net.1"), (x, y), tmp_path,
        max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=3,
    )  # fmt: skip
    model.register_forward_hook(lambda *_: seen.append(model.training))
    trainer.train()
    weights = (lambda n, sizes: n / sum(sizes)) if divides else (lambda n, sizes: 1.0)
    assert_same_weights(model.net, accumulated_by_hand(network(), lambda m, a: m(a), x, y, weights))
    assert seen.count(True) == 5
    assert seen.count(False) == 2  # that find out, once
    assert model.training


def test_a_causal_model_counts_the_tokens_that_it_predicts(tmp_path):
    """Between two steps of one weight, the term's gradient is weighed by tokens and not by batches."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    with seeded(0):
        config = GPT2Config(vocab_size=6, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # as models have it that are loaded
    ids = torch.randint(6, (6, 8), generator=torch.Generator().manual_seed(0))
    ids[:, 1] = torch.arange(6) % 2  # by which the term tells its classes
    labels = ids.clone()
    labels[:2, 3:] = -100  # the first batch predicts 2 tokens of each row, the others 7
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    weights = []

    class Watched(HuggingFaceSelectivity):
        def _weight(self, *args):
            weights.append(float(super()._weight(*args)))
            return weights[-1]

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    callback = Watched(-1.0, "transformer.h.0.mlp.act", negative="relu", targets=lambda named: named["labels"][:, 1])
    arguments = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_steps": 1}
    arguments |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    InOrder(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=rows, callbacks=[callback]).train()
    assert weights == pytest.approx([4 / 32, 14 / 32, 14 / 32])


def test_a_short_last_group_of_lightning_weighs_as_the_loss(blobs, tmp_path):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    (x, y), module = (part[:36] for part in blobs), Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning has advice on workers and loggers
        pl.Trainer(
            max_epochs=1, accumulate_grad_batches=3, accelerator="cpu", logger=False, enable_checkpointing=False,
            callbacks=[LightningSelectivity(-2.0, model=lambda m: m.net)], enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        ).fit(module, DataLoader(TensorDataset(x, y), batch_size=8))  # fmt: skip
    # Lightning divides by three in the group of two as well
    assert_same_weights(module.net, accumulated_by_hand(network(), lambda m, a: m(a), x, y, lambda n, sizes: 1 / 3))


def test_a_loss_of_the_trainer_s_own_is_refused(blobs, tmp_path):
    from transformers import Trainer

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return F.cross_entropy(outputs["logits"], inputs["labels"])

    trainer = trainer_for(Classifier(), HuggingFaceSelectivity(-2.0, "net.1"), blobs, tmp_path)
    trainer.__class__ = type("Mine", (Own, type(trainer)), {})
    with pytest.raises(InvalidInput, match="did not minimize the loss that the model returns"):
        trainer.train()
    trainer = trainer_for(Classifier(), HuggingFaceSelectivity(-2.0, "net.1"), blobs, tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, **_: F.cross_entropy(outputs["logits"], labels)
    with pytest.raises(InvalidInput, match="did not minimize the loss that the model returns"):
        trainer.train()


def test_what_the_trainer_would_ignore_is_refused(blobs, tmp_path):
    trainer = trainer_for(
        Classifier(), HuggingFaceSelectivity(-2.0, "net.1"), blobs, tmp_path, label_smoothing_factor=0.1
    )
    with pytest.raises(InvalidInput, match="ignores the model's own loss"):
        trainer.train()


def test_callbacks_can_be_sent_to_other_processes():
    for callback in (LightningSelectivity(-1.0, "net.1"), HuggingFaceSelectivity(-1.0, "net.1", negative="relu")):
        again = pickle.loads(pickle.dumps(callback))  # noqa: S301 (our own bytes)
        assert (again.alpha, again.layers, again.options) == (-1.0, "net.1", callback.options)
        assert again.regularizer is None
