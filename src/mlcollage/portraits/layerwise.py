"""Layer by layer: class selectivity of units, dimensions that are filled, and what a linear probe reads."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from mlcollage.measure import dimensionality, layer_probes, participation_ratio, ridge_probe
from mlcollage.papers.class_selectivity import SelectivityReport, measure_selectivity
from mlcollage.portraits.instrument import DoesNotApply, Number, Reading
from mlcollage.portraits.quality import OTHERS
from mlcollage.portraits.resampling import GROUPS, ends, jackknife, weights, wilson
from mlcollage.portraits.subject import Examples, Subject

_ROWS = 500  # examples whose dimensions are counted: singular values of (rows, units)


def _refuse_without_layers(subject: Subject) -> None:
    if not subject.layers:
        raise DoesNotApply("The network has no activations and no linear or convolutional layers as modules.")


# --- class selectivity ------------------------------------------------------------------------------------------------


def selectivity(subject: Subject) -> Reading:
    """Class selectivity index of all units, mean by layer and over layers."""
    _refuse_without_layers(subject)
    examples = subject.test.take(1000)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        report = _report(subject, examples)

    def again(rows: Tensor) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            part = _report(subject, examples.take(rows))
        return {"": part.mean, **{str(k): float(v) for k, v in part.per_layer["si"].items()}}

    spread = jackknife(again, examples.size, subject.seed)
    layers = report.per_layer
    numbers = [_with(spread, "selectivity", report.mean, "")]
    numbers += [_with(spread, "selectivity", float(v), str(name)) for name, v in layers["si"].items()]
    numbers += [Number("dead units", float((layers["dead"] * layers["units"]).sum() / layers["units"].sum()))]
    floor = float(report.per_unit.groupby("layer", sort=False)["floor"].mean().mean())
    health = [f"A unit without any preference would be expected to show {floor:.3f} with so many examples per class."]
    health += [str(w.message)[:1].upper() + str(w.message)[1:] for w in said if w.category is UserWarning]
    if subject.rectified:
        health.append("Responses are of both signs here; their positive parts were taken, since the index needs them.")
    if examples.size < 20 * subject.classes:
        health.append(f"{examples.size} examples for {subject.classes} classes are few.")
    return Reading("selectivity", numbers=numbers, health=health)


def _report(subject: Subject, examples: Examples) -> SelectivityReport:
    labels = examples.y.reshape(examples.size).long()
    batch = type(examples.batch)(examples.batch.args, examples.batch.kwargs, labels, examples.batch.mask)
    return measure_selectivity(
        subject.model,
        batch,
        list(subject.layers),
        num_classes=subject.classes,
        negative="relu" if subject.rectified else "error",
        generator=subject.seed,
        batch_size=128,
    )


def _with(spread: dict[str, tuple[float, float]], quantity: str, value: float, layer: str) -> Number:
    low, high = spread.get(layer, (float("nan"),) * 2)
    return Number(quantity, value, value + low, value + high, layer=layer, interval=OTHERS)


def selectivity_cost(subject: Subject) -> float:
    """Seconds: a forward pass and one for each group that is left out."""
    return 0.3 + 1.5 * (1 + GROUPS) * subject.forward * min(1000, subject.test.size)


# --- dimensions -------------------------------------------------------------------------------------------------------


def dimensions(subject: Subject) -> Reading:
    """Participation ratio of each layer, and components for 95% of the variance."""
    _refuse_without_layers(subject)
    found, skipped = subject.features("test")
    if not found:
        raise DoesNotApply("No layer gives one row of units for each example" + f": {' '.join(skipped)}")
    found = {name: x[:_ROWS] for name, x in found.items()}
    rows = len(next(iter(found.values())))

    def again(keep: Tensor) -> dict[str, float]:
        each = {name: participation_ratio(x[keep]) for name, x in found.items()}
        return {"": float(np.mean(list(each.values()))), **each}

    whole = again(torch.arange(rows))
    spread = jackknife(again, rows, subject.seed)
    numbers = [_with(spread, "dimensions", whole[""], "")]
    last = list(found)[-1]
    numbers += [_with({"": spread[last]}, "dimensions of the last layer", whole[last], "")]
    for name, x in found.items():
        numbers += [_with(spread, "dimensions", whole[name], name)]
        numbers += [Number("components for 95%", float(dimensionality(x)), layer=name)]
        numbers += [Number("units", float(x.shape[1]), layer=name, digits=6)]
    health = [f"From {rows} examples; a ratio near that number would be limited by it.", *skipped]
    return Reading("dimensions", numbers=numbers, health=health)


def dimensions_cost(subject: Subject) -> float:
    """Seconds: one forward pass and the singular values of each layer, without each group."""
    return 0.3 + 1.5 * subject.forward * subject.test.size + 0.05 * (1 + GROUPS) * len(subject.layers)


# --- probes -----------------------------------------------------------------------------------------------------------


def probes(subject: Subject) -> Reading:
    """Accuracy (or R²) of a linear probe on each layer, fitted on training and scored on test examples."""
    _refuse_without_layers(subject)
    assert subject.train is not None
    train, skipped = subject.features("train")
    test, _ = subject.features("test")
    names = [name for name in train if name in test]
    if not names:
        raise DoesNotApply("No layer gives one row of units for each example" + f": {' '.join(skipped)}")
    n = min(1000, subject.test.size)
    fitted, known = (part.y[:1000].cpu() for part in (subject.train, subject.test))
    health = [f"Fitted on {len(fitted)} examples of the training data, scored on {n} others.", *skipped]
    if subject.classes:
        pick = {k: train[k] for k in names}, {k: test[k] for k in names}
        found = layer_probes(pick[0], fitted.reshape(-1), pick[1], known.reshape(-1), num_classes=subject.classes)
        each = {name: (value, *wilson(value, n)) for name, value in found.items()}
        quantity = "probe accuracy"
    else:
        each, quantity = {}, "probe R²"
        w = weights(n, subject.seed, 300)
        y = known.double().reshape(n, -1).numpy()
        for name in names:
            probe = ridge_probe(train[name], fitted.double().reshape(len(fitted), -1))
            off = (probe.predict(test[name]).cpu().numpy() - y) ** 2
            spread = w @ y**2 / n - (w @ y / n) ** 2
            value = probe.score(test[name], known.double().reshape(n, -1))
            each[name] = (value, *ends((1 - (w @ off / n) / spread).mean(1)))
    best = max(each, key=lambda k: each[k][0])
    first = next(iter(each))
    numbers = [Number(f"best {quantity}", *each[best], interval=OTHERS)]
    numbers += [Number(f"first {quantity}", *each[first], interval=OTHERS)]
    numbers += [Number(quantity, *v, layer=name, interval=OTHERS) for name, v in each.items()]
    health.append(f"The best is that of {best}, chosen on the same examples, so a little too good.")
    return Reading("probes", numbers=numbers, health=health)


def probes_cost(subject: Subject) -> float:
    """Seconds: one forward pass over two sets, and a linear system for each layer."""
    examples = subject.test.size + (subject.train.size if subject.train else 0)
    return 0.3 + 1.5 * subject.forward * min(examples, 2000) + 0.06 * len(subject.layers)
