"""What is claimed of neural mechanics (Kunin, Sagastuy-Brena, Ganguli, Yamins, Tanaka, ICLR 2021).

Claims, margins and settings were written before the runs with the study's seeds. Claims speak of "the networks" and of
the laws found on them, so that they can be asked of a user's own model: what a model has no law for is reported as not
applicable, with the reason.

Two errors are used. *rel* is that of the prediction relative to the conserved quantity, *rc* relative to the quantity's
change since the start. The second is the harder one: to predict that nothing moves has rc = 1.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from mlcollage.errors import InvalidInput
from mlcollage.lab import Claim, PerSeed

NETWORKS = ("plain", "norm", "user")
QUADRATIC = ("scale", "rescale", "matrix")
EXACT = ("translation", "rescale", "matrix")


def _rows(rows: pd.DataFrame, metric: str, kinds: tuple[str, ...], **where: object) -> pd.DataFrame:
    """Rows of a metric for laws of these kinds; says why there are none if the model has no such law."""
    laws = rows[(rows["metric"] == "laws") & rows["kind"].isin(kinds) & rows["arm"].isin((*NETWORKS, "attention"))]
    found = rows[(rows["metric"] == metric) & rows["kind"].isin(kinds)]
    for column, value in where.items():
        found = found[found[column] == value] if column in found else found.iloc[:0]
    if found.empty:
        named = " or ".join(kinds)
        if kinds == ("bias",):
            raise InvalidInput("not applicable: no bias of the model is absorbed by what follows it.")
        if laws.empty or laws["value"].sum() == 0:
            raise InvalidInput(f"not applicable: no symmetry of kind {named} was found on the model.")
        if (rows.loc[rows["metric"] == "runs_in_float64", "value"] == 0).any():
            raise InvalidInput("not applicable: the model does not run in float64.")
        raise InvalidInput(f"not applicable: none of the model's symmetries of kind {named} is of the sort asked for.")
    return found


def gradient_residual(rows: pd.DataFrame) -> float:
    """Largest cosine residual of an exact law, over batches, laws and networks, float32."""
    found = _rows(rows, "gradient_residual", EXACT, precision="float32", epsilon=False)
    return float(found["value"].max())


def gradient_contrast(rows: pd.DataFrame) -> float:
    """Orders of magnitude between random index sets and the laws, median batch, worst kind and network, float32."""
    where = {"precision": "float32", "epsilon": False}
    control, found = (
        _rows(rows, name, EXACT, **where).set_index(["arm", "kind"])["value"]
        for name in ("gradient_control", "gradient_residual")
    )
    return float(np.log10(control / found.clip(lower=1e-30)).min())


def gradient_residual_double(rows: pd.DataFrame) -> float:
    """The same as the first in float64."""
    return float(_rows(rows, "gradient_residual", EXACT, precision="float64", epsilon=False)["value"].max())


def idle_biases(rows: pd.DataFrame) -> float:
    """Largest residual of a translation of biases alone, float64."""
    return float(_rows(rows, "gradient_residual", ("bias",), precision="float64")["value"].max())


def hessian_residual(rows: pd.DataFrame) -> float:
    """Largest residual of a Hessian constraint of an exact law, float64."""
    return float(_rows(rows, "hessian_residual", EXACT, precision="float64", epsilon=False)["value"].max())


def drift_slope(rows: pd.DataFrame) -> float:
    """Log-log slope of the drift over the learning rate, mean over networks and kinds with an exact quadratic law."""
    found = _rows(rows, "drift", ("rescale", "matrix"))
    slopes = [
        np.polyfit(np.log(group["eta"].astype(float)), np.log(group["value"].clip(lower=1e-300)), 1)[0]
        for _, group in found.groupby(["arm", "kind"])
    ]
    return float(np.mean(slopes))


def translation_drift(rows: pd.DataFrame) -> float:
    """Largest drift of a translation's quantity, relative to its size, over learning rates; no weight decay."""
    return float(_rows(rows, "drift", ("translation",))["value"].max())


def closed_form_error(rows: pd.DataFrame, kind: str) -> float:
    """Largest error of the closed form relative to the change, at the end, over weight decays and networks."""
    return float(_rows(rows, "closed_form_rc", (kind,), momentum=0.0)["value"].max())


def null_over_closed(rows: pd.DataFrame) -> float:
    """Error of "nothing moves" over error of the closed form, the smallest over kinds, weight decays and networks."""
    found = _rows(rows, "closed_form_rc", ("translation", "scale", "rescale"), momentum=0.0)
    return float(1 / found["value"].max())


def sign_agreement(rows: pd.DataFrame) -> float:
    """Share of steps and laws in which dQ has the sign of η‖g‖² − 2λQ, mean over kinds, decays and networks."""
    return float(_rows(rows, "sign_agreement", ("scale", "rescale"))["value"].mean())


def growing(rows: pd.DataFrame) -> dict[str, float]:
    """Share of steps in which a channel's norm grows, at the largest weight decay and at none."""
    found = _rows(rows, "growing", ("scale",))
    means = found.groupby("weight_decay")["value"].mean()
    return {"without decay": float(means.loc[0.0]), "with decay": float(means.loc[means.index.max()])}


def momentum_error(rows: pd.DataFrame) -> float:
    """Largest error of the oscillator relative to the change, at the end, over momenta, kinds and networks."""
    found = _rows(rows, "closed_form_rc", ("translation", "scale", "rescale"))
    return float(found[found["momentum"] > 0]["value"].max())


def inertia_gain(rows: pd.DataFrame) -> dict[str, float]:
    """log10 of the mean error after 1/(1-β) steps, without and with inertia, mean over kinds and momenta."""
    kinds = ("translation", "scale", "rescale")
    first, second = (_rows(rows, f"{name}_mean_rc", kinds)["value"] for name in ("first_order", "closed_form"))
    return {"first order": float(np.log10(first).mean()), "oscillator": float(np.log10(second).mean())}


def smoothness(rows: pd.DataFrame) -> float:
    """Roughness of single weights over that of row norms, the smallest over weight matrices (and networks)."""
    found = rows[(rows["metric"] == "roughness") & rows["arm"].isin(("norm", "user"))]
    if found.empty:
        raise InvalidInput("not applicable: no symmetry was found on the model, so it was not trained.")
    table = found.pivot_table(index=["arm", "layer"], columns="what", values="value")
    return float((table["entry"] / table["norm"]).min())


def ledger_error(rows: pd.DataFrame) -> float:
    """Largest error of the ledger relative to the quantity, exact laws, float64, SGD with everything."""
    return float(_rows(rows, "ledger_rel", EXACT, epsilon=False, optimizer="SGD")["value"].max())


def accounted_error(rows: pd.DataFrame) -> float:
    """The same with the measured residual of the symmetry, all laws, SGD and AdamW."""
    return float(_rows(rows, "accounted_rel", ("translation", *QUADRATIC))["value"].max())


def epsilon_share(rows: pd.DataFrame) -> float:
    """Orders of magnitude that the measured residual takes off the ledger's error for laws with an epsilon, SGD."""
    where = {"epsilon": True, "optimizer": "SGD"}
    every = ("translation", *QUADRATIC)
    without, told = (_rows(rows, name, every, **where)["value"] for name in ("ledger_rel", "accounted_rel"))
    return float(np.log10(without.max() / max(told.max(), 1e-300)))


def ledger_single(rows: pd.DataFrame) -> float:
    """Largest error of the ledger relative to the quantity, translation and rescale, float32, no momentum."""
    return float(_rows(rows, "predicted_rel", ("translation", "rescale"), momentum=0.0)["value"].max())


def attention_residual(rows: pd.DataFrame) -> float:
    """Largest cosine residual of a law of the transformer, float64."""
    _rows(rows, "attention_residual", ("matrix",))  # the model has attention whose laws were found
    return float(_rows(rows, "attention_residual", ("translation", *QUADRATIC))["value"].max())


def attention_ledger(rows: pd.DataFrame) -> float:
    """Largest error of the ledger relative to the quantity on the transformer's matrix laws, float64."""
    return float(_rows(rows, "attention_ledger", ("matrix",))["value"].max())


# Statements that are true or false: every seed must satisfy them.
_Exact = partial(Claim, test="exact")
_AtMost = partial(_Exact, direction="at_most")
_WithinOnePercent = partial(_AtMost, null=0.01, factor=100, unit="%")

CLAIMS = (
    _AtMost(
        id="C1",
        title="Gradients obey the symmetries' constraints",
        headline=True,
        sentence="Every batch's gradient obeys the constraints of all exact translation, rescale and matrix laws "
        "found: the cosine residual is at most 5e-6 in float32, in every network.",
        source="Sec. 3",
        estimand=PerSeed(gradient_residual, "largest residual of a gradient constraint, exact laws, float32"),
        null=5e-6,
    ),
    Claim(
        id="C1b",
        title="Random sets of weights break the same constraints",
        kind="check",
        sentence="The same index sets laid over rearranged parameters violate the constraints by at least three orders "
        "of magnitude more.",
        source="Sec. 3",
        estimand=PerSeed(gradient_contrast, "log10 of control over residual, worst kind and network, float32"),
        direction="at_least",
        null=3.0,
        unit="orders",
        digits=1,
    ),
    _AtMost(
        id="C1c",
        title="In float64 the gradient constraints hold to rounding",
        kind="check",
        sentence="In float64 the residuals of exact symmetries are at most 1e-12.",
        source="Sec. 3",
        estimand=PerSeed(gradient_residual_double, "largest residual of a gradient constraint, exact laws, float64"),
        null=1e-12,
    ),
    _AtMost(
        id="C1d",
        title="Biases that a later layer cancels get no gradient",
        kind="check",
        sentence="A bias whose shift a norm or a softmax takes away (before batch norm, on attention's keys) has no "
        "gradient, to 1e-10 in float64.",
        source="beyond the paper",
        estimand=PerSeed(idle_biases, "largest residual of a translation of biases alone, float64"),
        null=1e-10,
    ),
    _AtMost(
        id="C2",
        title="Hessians obey the symmetries' constraints as well",
        headline=True,
        sentence="Every Hessian constraint of an exact symmetry holds to 1e-10 in float64.",
        source="Sec. 3",
        estimand=PerSeed(hessian_residual, "largest residual of a Hessian constraint, exact laws, float64"),
        null=1e-10,
    ),
    Claim(
        id="C3",
        title="Quantities are conserved as the steps shrink",
        headline=True,
        sentence="At the same physical time, the drift of rescale laws under full-batch descent without weight decay "
        "falls in proportion to the learning rate: the log-log slope is 1 within 0.1.",
        source="Sec. 4",
        estimand=PerSeed(drift_slope, "log-log slope of the drift over six learning rates"),
        direction="within",
        null=1.0,
        margin=0.1,
        says={
            "supported": "Halve the learning rate and laws drift half as much: slope {effect}",
            "contradicted": "Laws do not drift in proportion to the learning rate: slope {effect}",
            "inconclusive": "How laws drift with the learning rate is open: slope {effect}",
        },
    ),
    _AtMost(
        id="C3b",
        title="Sums of weights are conserved at any step size",
        kind="check",
        sentence="Without weight decay the quantity of a translation drifts by at most 1e-12 of itself at every "
        "learning rate, in float64.",
        source="Sec. 4",
        estimand=PerSeed(translation_drift, "largest relative drift of a translation, no weight decay, float64"),
        null=1e-12,
    ),
    _WithinOnePercent(
        id="C4t",
        title="A closed form predicts sums of weights",
        sentence="After all steps of SGD with weight decay, the closed form's error on translation laws is at most 1 % "
        "of the change, at every weight decay above 0.",
        source="eq. 18",
        estimand=PerSeed(
            lambda rows: closed_form_error(rows, "translation"),
            "rc of translation laws, worst weight decay and network",
        ),
    ),
    _WithinOnePercent(
        id="C4s",
        title="A closed form predicts how weight norms move",
        headline=True,
        sentence="The same for scale laws (weights before batch norm), at every weight decay.",
        source="eq. 19",
        estimand=PerSeed(
            lambda rows: closed_form_error(rows, "scale"), "rc of scale laws, worst weight decay and network"
        ),
        says={
            "supported": "A closed form predicts how weight norms move, to {effect} of the change",
            "contradicted": "A closed form misses how weight norms move, by {effect} of the change",
            "inconclusive": "Whether a closed form predicts how weight norms move is open ({effect})",
        },
    ),
    _WithinOnePercent(
        id="C4r",
        title="A closed form predicts norm differences",
        sentence="The same for rescale laws (weights into and out of a ReLU), at every weight decay.",
        source="eq. 20",
        estimand=PerSeed(
            lambda rows: closed_form_error(rows, "rescale"), "rc of rescale laws, worst weight decay and network"
        ),
    ),
    _Exact(
        id="C4n",
        title="A closed form beats predicting no motion",
        sentence="The prediction that nothing moves errs at least 20 times as much as the closed form, for every kind "
        "of law, weight decay and network.",
        source="Fig. 5",
        estimand=PerSeed(null_over_closed, "error of 'nothing moves' over error of the closed form, the smallest"),
        direction="at_least",
        null=20.0,
        unit="×",
        digits=0,
    ),
    _Exact(
        id="C5",
        title="Two opposing forces decide whether weight norms grow",
        sentence="In at least 99 % of steps a law's quantity moves in the direction of centrifugal minus centripetal "
        "force, η‖g‖² − 2λQ.",
        source="Fig. 5",
        estimand=PerSeed(sign_agreement, "share of steps with the sign of the force, scale and rescale laws"),
        direction="at_least",
        null=0.99,
        factor=100,
        unit="%",
        bounds=(0, 1),
        digits=1,
    ),
    Claim(
        id="C5b",
        title="Weight decay turns the growth of weight norms around",
        sentence="Channel norms before batch norm grow in fewer steps with the largest weight decay than without.",
        source="Fig. 5",
        estimand=PerSeed(growing, "share of steps in which a norm grows, without minus with weight decay"),
        direction="greater",
        margin=0.1,
        factor=100,
        unit="pts",
        digits=1,
    ),
    _WithinOnePercent(
        id="C6",
        title="With momentum, norms move like oscillators",
        headline=True,
        sentence="With momentum 0.9 and 0.99 the damped oscillator's error is at most 1 % of the change, for every "
        "kind of law.",
        source="Sec. 5",
        estimand=PerSeed(momentum_error, "rc with momentum at the end, worst momentum and kind"),
        says={
            "supported": "With momentum, laws follow a damped oscillator to {effect}",
            "contradicted": "With momentum, a damped oscillator is off by {effect}",
            "inconclusive": "Whether laws follow a damped oscillator is open ({effect})",
        },
    ),
    Claim(
        id="C6b",
        title="With momentum, a theory without inertia errs more",
        sentence="After 1/(1-β) steps the oscillator errs less than the first-order flow with the same forces.",
        source="Sec. 5",
        estimand=PerSeed(inertia_gain, "log10 of the mean rc: first-order flow minus oscillator"),
        direction="greater",
        margin=0.3,
        unit="orders",
    ),
    _Exact(
        id="C7",
        title="Neurons' norms move more smoothly than single weights",
        sentence="In every weight matrix, row norms have less total variation per net change than single weights.",
        source="Fig. 1",
        estimand=PerSeed(smoothness, "roughness of weights over roughness of row norms, worst layer"),
        direction="greater",
        null=1.0,
        unit="×",
    ),
    _AtMost(
        id="C8",
        title="An exact ledger predicts the conserved quantities",
        kind="check",
        sentence="With momentum, dampening, weight decay and a schedule, the discrete ledger predicts exact laws to "
        "1e-12 of the quantity in float64.",
        source="beyond the paper",
        estimand=PerSeed(ledger_error, "largest error of the ledger, exact laws, float64"),
        null=1e-12,
    ),
    _AtMost(
        id="C8b",
        title="The ledger accounts for every change, also under AdamW",
        kind="check",
        sentence="With the measured residual of the symmetry the ledger accounts for every law to 1e-12, for SGD and "
        "for AdamW.",
        source="beyond the paper",
        estimand=PerSeed(accounted_error, "largest error of the ledger that is told the residual, all laws, float64"),
        null=1e-12,
    ),
    _Exact(
        id="C8c",
        title="Batch norm's epsilon is what breaks its conservation law",
        sentence="For laws with an epsilon, that residual takes at least three orders of magnitude off the error.",
        source="beyond the paper",
        estimand=PerSeed(epsilon_share, "log10 of the ledger's error without over with the residual, float64"),
        direction="at_least",
        null=3.0,
        unit="orders",
        digits=1,
    ),
    _AtMost(
        id="C8d",
        title="In float32 the ledger is right to single precision",
        kind="check",
        sentence="In float32 the ledger predicts translation and rescale laws to 5e-6 of the quantity.",
        source="beyond the paper",
        estimand=PerSeed(ledger_single, "largest error of the ledger, translation and rescale, float32"),
        null=5e-6,
    ),
    _AtMost(
        id="C9",
        title="Attention layers have conservation laws too",
        sentence="All exact laws found on a transformer (query-key and value-output matrices among them) hold for its "
        "gradients to 1e-12 in float64.",
        source="beyond the paper",
        estimand=PerSeed(attention_residual, "largest residual of a gradient constraint of the transformer, float64"),
        null=1e-12,
    ),
    _AtMost(
        id="C9b",
        title="The ledger predicts attention's conserved matrices",
        kind="check",
        sentence="The ledger predicts the transformer's matrix laws under SGD with momentum and weight decay to 1e-12.",
        source="beyond the paper",
        estimand=PerSeed(attention_ledger, "largest error of the ledger on matrix laws, float64"),
        null=1e-12,
    ),
)
