r"""Which preset to pre-train with: predicted from the accuracies printed in Fig. 4 and from sweeps of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn.vit_models import AUGREG_MODELS, model_table
from mlcollage.train.augreg import PRESETS

_IMAGES = {"i1k": 1_281_167, "i21k": 13_153_500}
_COLUMNS = ("images", "epochs", "params", "augmentation", "dropout", "accuracy")
_DEFAULT = ("medium1", 0.0)  # what is recommended where the table tells nothing
_BONUS = 1.0  # the default's expected lead over the other presets, in standard deviations of gains
_ALWAYS = ("medium1", 0.1)  # the rival: one preset for all


def published_sweep() -> pd.DataFrame:
    """Accuracies of Fig. 4 in a table: nine models, two settings of pre-training, fourteen presets.

    Whole per cents as printed in the figure, each the best over two weight decays.

    Returns
    -------
    pandas.DataFrame
        ``setting``, ``model``, ``images``, ``epochs``, ``params``, ``augmentation``, ``dropout`` (and stochastic
        depth), ``accuracy`` (per cent, upstream validation).

    Examples
    --------
    >>> table = published_sweep()
    >>> len(table), table["model"].nunique(), sorted(table["setting"].unique())
    (252, 9, ['i1k_300ep', 'i21k_30ep'])
    """
    file = resources.files(__package__) / "augreg_upstream_accuracy.csv"
    with file.open("r") as text:
        raw = pd.read_csv(text)
    size = model_table([m for m in AUGREG_MODELS if m in set(raw["model"])]).set_index("model")["params"]
    name = raw["pretraining"].str.split("_").str[0]
    return pd.DataFrame(
        {
            "setting": raw["pretraining"],
            "model": raw["model"],
            "images": name.map(_IMAGES),
            "epochs": raw["pretraining"].str.extract(r"_(\d+)ep")[0].astype(int),
            "params": raw["model"].map(size),
            "augmentation": raw["augmentation"],
            "dropout": raw["dropout_and_stochastic_depth"],
            "accuracy": raw["upstream_accuracy_percent"].astype(float),
        }
    )


class PresetRecommender:
    r"""Predict what each preset gains over the mean of all, with its uncertainty, and recommend the best.

    Within each model and setting the accuracy minus the mean of its presets is a function of
    :math:`\log` images, :math:`\log` epochs, :math:`\log` parameters, the place of the augmentation from none (0) to
    strong2 (6), and regularization (0 or 1); a Gaussian process with one length for each, fitted by maximum likelihood,
    gives its mean and deviation. Before any data it expects a lead of one standard deviation for medium1 without
    regularization, so that this is recommended far from all runs of the table: with a whole setting left out the
    process alone lost 5.3 points to the best preset, and medium1 loses 1.8. It is about pre-training: augmentation did
    not help fine-tuning in the paper.

    Parameters
    ----------
    table
        Runs, with the columns of :func:`published_sweep`, of which ``setting`` and ``model`` say what belongs together.
        None: the published ones. Append sweeps of your own with ``pandas.concat``.

    Raises
    ------
    InvalidInput
        If a column is missing or numbers are not finite.

    Examples
    --------
    >>> table = published_sweep()
    >>> some = table[table["model"].isin(["Ti/16", "S/16", "B/16", "L/16"])]
    >>> advice = PresetRecommender(some).recommend(images=1_281_167, epochs=300, params=22e6)
    >>> list(advice.columns), len(advice)
    (['augmentation', 'dropout', 'gain', 'sd', 'best_probability'], 14)
    """

    def __init__(self, table: pd.DataFrame | None = None) -> None:
        table = published_sweep() if table is None else table
        missing = [c for c in (*_COLUMNS, "setting", "model") if c not in table]
        if missing:
            raise InvalidInput(f"the table has no column {', '.join(map(repr, missing))}.")
        numbers = table[["images", "epochs", "params", "dropout", "accuracy"]].to_numpy(float)
        if len(table) < 5 or not np.isfinite(numbers).all():
            raise InvalidInput("the table needs five rows of finite numbers; drop runs that failed.")
        if (table[["images", "epochs", "params"]] <= 0).any(axis=None) or (table["dropout"] < 0).any():
            raise InvalidInput("images, epochs and params must be positive in every row, and dropout 0 or more.")
        for name in table["augmentation"].unique():
            checks.choice("augmentation", name, PRESETS)
        self.table = table.reset_index(drop=True)
        group = self.table.groupby(["setting", "model"])["accuracy"]
        gains = (self.table["accuracy"] - group.transform("mean")).to_numpy(float)
        x = _features(self.table)
        self._center, self._spread = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)
        self._scale = float(gains.std()) or 1.0
        expected = _BONUS * self._favored(self.table)
        kernel = ConstantKernel(1.0, (1e-2, 1e2)) * RBF(np.ones(x.shape[1]), (0.3, 30.0)) + WhiteKernel(
            0.1, (1e-3, 1.0)
        )
        self._process = GaussianProcessRegressor(kernel, random_state=0, n_restarts_optimizer=0)
        self._process.fit((x - self._center) / self._spread, gains / self._scale - expected)

    @staticmethod
    def _favored(table: pd.DataFrame) -> NDArray[np.float64]:
        """1 for the default preset, 0 for the others."""
        same = (table["augmentation"] == _DEFAULT[0]) & (table["dropout"] == _DEFAULT[1])
        return np.where(same, 1.0, 0.0)

    def recommend(self, *, images: float, epochs: float, params: float, stage: str = "pretrain") -> pd.DataFrame:
        """The presets, best first.

        Parameters
        ----------
        images
            Training images.
        epochs
            Passes over them.
        params
            Parameters of the model.
        stage
            ``"pretrain"``. For ``"finetune"`` there is no data here: the paper found no gain from AugReg, and that is
            said instead of a guess.

        Returns
        -------
        pandas.DataFrame
            ``augmentation``, ``dropout``, ``gain`` over the mean preset (points), its standard deviation ``sd``, and
            ``best_probability``, the share of joint draws in which the preset is the best.
        """
        checks.choice("stage", stage, ("pretrain", "finetune"))
        if stage == "finetune":
            raise InvalidInput("the table is about pre-training; in fine-tuning the paper uses no AugReg at all.")
        asked = {"images": images, "epochs": epochs, "params": params}
        asked = {name: checks.positive(name, value) for name, value in asked.items()}
        rows = pd.DataFrame(
            [{**asked, "augmentation": name, "dropout": rate} for name in PRESETS for rate in (0.0, 0.1)]
        )
        beyond = [k for k, v in asked.items() if not 0.5 * self.table[k].min() <= v <= 2 * self.table[k].max()]
        if beyond or self.table["images"].nunique() == 1:
            what = (
                f"the table has no runs with such {' and '.join(beyond)}" if beyond else "the table is of one data set"
            )
            warnings.warn(
                f"{what}: farther away the advice becomes medium1 without regularization, whatever is asked; add a "
                "sweep of your own.",
                stacklevel=2,
            )
        x = (_features(rows) - self._center) / self._spread
        mean, cov = self._process.predict(x, return_cov=True)
        mean = mean + _BONUS * self._favored(rows)
        draws = np.random.default_rng(0).multivariate_normal(mean, cov, size=2000, method="eigh")
        best = np.bincount(draws.argmax(1), minlength=len(rows)) / len(draws)
        found = rows[["augmentation", "dropout"]].assign(
            gain=mean * self._scale, sd=np.sqrt(np.clip(np.diag(cov), 0, None)) * self._scale, best_probability=best
        )
        return found.sort_values("gain", ascending=False, kind="stable").reset_index(drop=True)


def judge_recommender(table: pd.DataFrame | None = None, *, leave_out: str = "model") -> pd.DataFrame:
    """Accuracy lost to the best preset when each model, or each setting, was left out of the fit.

    Parameters
    ----------
    table
        As for :class:`PresetRecommender`.
    leave_out
        ``"model"`` or ``"setting"``.

    Returns
    -------
    pandas.DataFrame
        A row for each model and setting: ``recommender``, ``always_medium1`` (medium1 with regularization),
        ``always_medium1_plain`` (without) and ``none``: points lost to the best of the presets.
    """
    checks.choice("leave_out", leave_out, ("model", "setting"))
    table = published_sweep() if table is None else table
    rows: list[dict[str, Any]] = []
    for left in table[leave_out].unique():
        rest = table[table[leave_out] != left]
        if rest.empty:
            raise InvalidInput(f"leaving {left!r} out leaves nothing to fit to.")
        model = PresetRecommender(rest)
        for (setting, name), group in table[table[leave_out] == left].groupby(["setting", "model"], sort=False):
            first = group.iloc[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the warning says is measured here
                advice = model.recommend(images=first["images"], epochs=first["epochs"], params=first["params"])
            chosen = advice.iloc[0]
            at = group.set_index(["augmentation", "dropout"])["accuracy"]
            best = float(at.max())
            rows.append(
                {
                    "setting": setting,
                    "model": name,
                    "recommender": best - float(at[chosen["augmentation"], chosen["dropout"]]),
                    "always_medium1": best - float(at[_ALWAYS]),
                    "always_medium1_plain": best - float(at["medium1", 0.0]),
                    "none": best - float(at["none", 0.0]),
                }
            )
    return pd.DataFrame(rows)


def _features(table: pd.DataFrame) -> NDArray[np.float64]:
    place: Sequence[str] = list(PRESETS)
    return np.column_stack(
        [
            np.log(table["images"].to_numpy(float)),
            np.log(table["epochs"].to_numpy(float)),
            np.log(table["params"].to_numpy(float)),
            [place.index(name) for name in table["augmentation"]],
            (table["dropout"].to_numpy(float) > 0).astype(float),
        ]
    )
