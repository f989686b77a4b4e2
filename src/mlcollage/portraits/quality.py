"""Is it right, and does it know when it is not? Accuracy and calibration, or the errors of a regression."""

from __future__ import annotations

import math

import numpy as np

from mlcollage import _random
from mlcollage.measure import accuracy, brier, calibration_curve, ece, nll
from mlcollage.portraits.instrument import DoesNotApply, Number, Reading
from mlcollage.portraits.resampling import Floats, ends, weights, wilson
from mlcollage.portraits.subject import Subject

_BINS = 20
_NONE = (math.nan, math.nan)
OTHERS = "95%, other test examples"


def quality(subject: Subject) -> Reading:
    """Accuracy, negative log-likelihood, Brier score and calibration; or R², RMSE and MAE."""
    if subject.task == "regression":
        return _errors(subject)
    if not subject.classes:
        raise DoesNotApply(
            "It judges one class or number for each example; the outputs fit neither, say task= if they do."
        )
    p, y = subject.probabilities(), subject.labels
    n = len(y)
    hit = (p.argmax(1) == y).astype(float)
    with np.errstate(divide="ignore"):
        losses = -np.log(p[np.arange(n), y])
    scores = np.square(p - np.eye(p.shape[1])[y]).sum(1)
    w = weights(n, subject.seed)  # (resamples, n)
    health = []
    infinite = int(np.isinf(losses).sum())
    if infinite:
        health.append(f"{infinite} labels had probability 0, so the negative log-likelihood is infinite.")
    curve = calibration_curve(p, y, _BINS)
    confidence = p.max(1)
    gap, draws, floor = _calibration(confidence, hit, w, subject.seed)
    # Bins of few examples are off by chance, so resamples are further off than the sample: reflected at the estimate.
    low, high = ends(draws)
    low, high = max(0.0, 2 * gap - high), max(gap, 2 * gap - low)
    health.append(
        f"A perfectly calibrated network with these confidences would show a calibration error of about {floor:.3f} on "
        f"{n} examples, by chance alone."
    )
    share = np.bincount(y, minlength=p.shape[1]).max() / n
    health.append(f"Always naming the most frequent class is right for {share:.1%} of the test examples.")
    numbers = [
        Number("accuracy", accuracy(p, y), *wilson(float(hit.mean()), n), interval=OTHERS),
        Number("ece", ece(p, y, _BINS), low, high, interval=OTHERS),
        Number("nll", nll(p, y), *(ends(w @ losses / n) if not infinite else _NONE), unit="nats", interval=OTHERS),
        Number("brier", brier(p, y), *ends(w @ scores / n), interval=OTHERS),
        Number("overconfidence", *_paired(confidence - hit, w), interval=OTHERS),
    ]
    arrays = {"confidence": curve.confidence, "right": curve.accuracy, "share": curve.weight}
    return Reading("quality", numbers=numbers, health=health, arrays=arrays)


def _paired(values: Floats, w: Floats) -> tuple[float, float, float]:
    """A mean with its bootstrap ends."""
    return (float(values.mean()), *ends(w @ values / len(values)))


def _calibration(confidence: Floats, hit: Floats, w: Floats, seed: int) -> tuple[float, Floats, float]:
    """Calibration error, its resamples, and what chance alone would give."""
    n = len(hit)
    place = np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], confidence, side="left")
    bins = np.eye(_BINS)[place]  # (n, bins)

    def error(counts: Floats, right: Floats) -> Floats:
        return np.abs(counts @ (bins * (confidence - right)[:, None])).sum(-1) / n

    rng = np.random.default_rng(_random.derive(seed, 7))
    lucky = [error(np.ones(n), (rng.random(n) < confidence).astype(float)) for _ in range(200)]
    return float(error(np.ones(n), hit)), error(w, hit), float(np.mean(lucky))


def _errors(subject: Subject) -> Reading:
    z = subject.outputs
    assert not isinstance(z, str)
    z = z.reshape(len(z), -1)
    y = subject.test.y.double().cpu().reshape(z.shape)
    off, n = (z - y).numpy(), len(y)
    w = weights(n, subject.seed)
    squares, absolute = (off**2).mean(1), np.abs(off).mean(1)
    truth = y.numpy()

    def explained(counts: Floats) -> Floats:
        total = counts.sum(-1, keepdims=True)
        mean = counts @ truth / total
        spread = counts @ truth**2 / total - mean**2
        with np.errstate(divide="ignore", invalid="ignore"):
            return (1 - (counts @ off**2 / total) / spread).mean(-1)

    health = []
    if float(truth.std(0).min()) == 0:
        health.append("A target is the same in all test examples, so R² has no meaning for it.")
    one = np.ones((1, n))
    numbers = [
        Number("r2", float(explained(one)[0]), *ends(explained(w)), interval=OTHERS),
        Number(
            "rmse", float(np.sqrt(squares.mean())), *ends(np.sqrt(w @ squares / n)), unit="of target", interval=OTHERS
        ),
        Number("mae", float(absolute.mean()), *ends(w @ absolute / n), unit="of target", interval=OTHERS),
        Number("bias", *_paired(off.mean(1), w), unit="of target", interval=OTHERS),
    ]
    flat = slice(0, 500)
    return Reading(
        "quality", numbers=numbers, health=health, arrays={"predicted": z.numpy()[flat, 0], "target": truth[flat, 0]}
    )
