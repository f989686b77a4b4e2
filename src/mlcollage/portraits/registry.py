"""All instruments there are: the portrait's pages and the matrix' columns."""

from __future__ import annotations

from mlcollage.portraits import beliefs, curvature, heads, laws, layerwise, likeness, online, quality
from mlcollage.portraits.instrument import Instrument

INSTRUMENTS: tuple[Instrument, ...] = (
    Instrument(
        "quality",
        "Accuracy and calibration",
        "How often is it right, and is it as sure as it should be?",
        "bnn_posteriors",
        ("accuracy", "ece", "nll", "brier", "overconfidence", "r2", "rmse", "mae", "bias"),
        quality.quality,
        lambda s: 0.5 + s.forward * s.test.size,
        ("outputs", "labels"),
    ),
    Instrument(
        "dimensions",
        "Dimensionality",
        "How many directions does each layer use?",
        "class_selectivity",
        ("dimensions", "dimensions of the last layer"),
        layerwise.dimensions,
        layerwise.dimensions_cost,
    ),
    Instrument(
        "skips",
        "Skip ratios",
        "How much larger is what skips a block than what the block adds?",
        "vit_vs_cnn",
        ("skip ratio",),
        heads.skips,
        heads.skips_cost,
    ),
    Instrument(
        "attention",
        "Attention distance",
        "How far do its heads look?",
        "vit_vs_cnn",
        ("attention distance", "attention reach"),
        heads.attention,
        heads.attention_cost,
    ),
    Instrument(
        "probes",
        "Linear probes by layer",
        "From which layer on can the answer be read by a linear map?",
        "vit_vs_cnn",
        ("best probe accuracy", "first probe accuracy", "best probe R²", "first probe R²"),
        layerwise.probes,
        layerwise.probes_cost,
        ("labels", "train", "outputs"),
    ),
    Instrument(
        "selectivity",
        "Class selectivity",
        "Do single units respond to single classes?",
        "class_selectivity",
        ("selectivity", "dead units"),
        layerwise.selectivity,
        layerwise.selectivity_cost,
        ("labels", "probabilities"),
    ),
    Instrument(
        "likeness",
        "CKA map and uniformity",
        "Are early and late layers alike, and is it still like what it was before training?",
        "vit_vs_cnn",
        ("uniformity", "uniformity gained", "likeness to untrained"),
        likeness.likeness,
        likeness.likeness_cost,
    ),
    Instrument(
        "fisher",
        "Tr(F), Fisher information",
        "How sensitive is what it says to its weights?",
        "fisher_explosion",
        ("tr_fisher",),
        curvature.fisher,
        curvature.fisher_cost,
        ("outputs",),
    ),
    Instrument(
        "hessian",
        "Tr(H), curvature of the loss",
        "How sharp is the minimum that it lies in?",
        "fisher_explosion",
        ("tr_hessian",),
        curvature.hessian,
        curvature.hessian_cost,
        ("outputs", "labels"),
    ),
    Instrument(
        "laws",
        "Symmetries and conserved quantities",
        "Which symmetries has it, and how far has training moved what they conserve?",
        "neural_mechanics",
        ("conservation laws", "moved"),
        laws.laws,
        laws.laws_cost,
    ),
    Instrument(
        "posterior",
        "A cheap posterior",
        "What does doubt about the last layer's weights change?",
        "bnn_posteriors",
        ("confidence changed", "nll changed", "entropy changed", "ece changed", "brier changed", "accuracy changed"),
        beliefs.posterior,
        beliefs.posterior_cost,
        ("labels", "train", "probabilities"),
    ),
    Instrument(
        "online",
        "Online gap",
        "What does reusing data cost this architecture?",
        "deep_bootstrap",
        ("online gap", "online soft error"),
        online.online,
        online.online_cost,
        ("labels", "train", "untrained", "probabilities"),
    ),
)
"""In the order of a page; a portrait takes the cheapest first."""

TITLES = {
    "accuracy": "accuracy",
    "ece": "expected calibration error (ECE)",
    "nll": "negative log-likelihood (NLL)",
    "brier": "Brier score",
    "overconfidence": "confidence minus accuracy",
    "r2": "R²",
    "rmse": "root mean squared error",
    "mae": "mean absolute error",
    "bias": "mean error",
    "tr_fisher": "Tr(F)",
    "tr_hessian": "Tr(H)",
    "dimensions": "participation ratio, mean over layers",
    "dimensions of the last layer": "participation ratio of the last layer",
    "selectivity": "class selectivity, mean over layers",
    "skip ratio": "skip ratio, median over blocks",
    "uniformity": "uniformity (CKA of early with late layers)",
    "uniformity gained": "uniformity gained over the untrained network",
    "likeness to untrained": "CKA with the untrained network",
    "moved": "share of conserved quantities that has moved",
}
"""Quantities in full, where their name is short."""


def titled(quantity: str) -> str:
    """The name of a quantity as pages print it."""
    return TITLES.get(quantity, quantity)
