"""The macro-intent VRNN as an estimator: fit on tracks and a labeling function, continue tracks, score them."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from mlcollage import _checks as checks
from mlcollage._random import derive, generator
from mlcollage.errors import InvalidInput
from mlcollage.train import warmup_cosine

from .checkpoint import Training, digest, resume_training, save_training
from .frames import TrackBatch
from .labeling import ABSTAIN, GridIntent, LabelingFunction, tracks
from .macro_vrnn import MacroVRNN

__all__ = ["MacroTrajectoryModel"]


class MacroTrajectoryModel(BaseEstimator):
    """Generate tracks of several agents, steered by macro-intents.

    Parameters
    ----------
    labeling
        Labeling function that makes macro-intents of tracks; None takes those given to :meth:`fit`.
    shared_intent
        One intent for all agents of a frame, instead of one for each.
    hidden, rnn, z
        Widths of hidden layers, recurrent states and latents.
    agent_params
        ``"tied"``: all agents share weights, and see the nearest others; any order, agents may be missing.
        ``"separate"``: as in the paper, where slot k always holds the same role.
    max_iter
        Updates, 300 by default.
    batch_size, window
        Sequences and frames of an update.
    learning_rate
        Peak rate of Adam, with a warm-up and a cosine.
    fps
        Frames a second, passed to ``labeling``.
    checkpoint
        File that is written every ``checkpoint_every`` updates and at the end; :meth:`fit` with the same data and
        settings goes on from it, to the same weights as without a stop, and refuses one of others.
    checkpoint_every
        Updates from one to the next.
    random_state
        Whole number that seeds weights, batches and latents.
    device
        Where to train.

    Attributes
    ----------
    model_ : MacroVRNN
        The trained network, in the unit of the tracks.
    loss_curve_ : list of float
        Negative bound of each update, in nats a sequence window.
    label_report_ : dict
        Coverage, number of classes used, and accuracy of repeating the last label, a rival for the macro model.
    health_ : dict
        Of the first sequences: ``kl``, ``active`` and ``gain`` of the latents (as ``model_.latent_use`` has them), the
        share of numbers ``at floor``, and in nats for each label ``macro``, the macro model's cross-entropy, beside
        ``label entropy``, that of the labels' shares alone. Latents that carry nothing, and likelihoods that come from
        the floor, are warned of.

    Examples
    --------
    >>> from mlcollage.papers.programmatic_trajectories import HalfCourtWorld, Stationary
    >>> plays = HalfCourtWorld.draw(40, seed=0)
    >>> model = MacroTrajectoryModel(Stationary(), fps=plays.fps, hidden=8, rnn=8, max_iter=5).fit(plays.x)
    >>> model.sample(plays.x[:2, :10], steps=5, n=3).shape
    (3, 2, 15, 5, 2)
    """

    def __init__(
        self,
        labeling: LabelingFunction | None = None,
        *,
        shared_intent: bool = False,
        hidden: int = 64,
        rnn: int = 64,
        z: int = 8,
        agent_params: str = "tied",
        max_iter: int = 300,
        batch_size: int = 24,
        window: int = 25,
        learning_rate: float = 3e-3,
        fps: float | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
        random_state: int = 0,
        device: str = "cpu",
    ) -> None:
        self.labeling = labeling
        self.shared_intent = shared_intent
        self.hidden = hidden
        self.rnn = rnn
        self.z = z
        self.agent_params = agent_params
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.window = window
        self.learning_rate = learning_rate
        self.fps = fps
        self.checkpoint = checkpoint
        self.checkpoint_every = checkpoint_every
        self.random_state = random_state
        self.device = device

    def fit(self, X: NDArray, L: NDArray | None = None) -> MacroTrajectoryModel:
        """Train on tracks (N, T, K, D) and intents (N, T, K), or (N, T) where they are shared.

        Raises
        ------
        InvalidInput
            If there are neither intents nor a labeling function, all abstain, tracks do not lie on the labeling
            function's grid (another unit, perhaps), positions in single precision are so far from their origin that
            steps are lost, shapes do not fit, or the checkpoint is of other data or settings.
        """
        seed = checks.integer("random_state", self.random_state, least=0)
        batch = checks.integer("batch_size", self.batch_size, least=1)
        if self.labeling is not None and not isinstance(self.labeling, LabelingFunction):
            raise InvalidInput(f"labeling must be a labeling function (or None); got {self.labeling!r}.")
        window = checks.integer("window", self.window, least=2)
        x, seen, _ = tracks(X)
        if x.shape[1] < 2:
            raise InvalidInput(f"a sequence needs two frames at least; got tracks {x.shape}.")
        _check_digits(np.asarray(X), x, seen)
        grid = self.labeling if isinstance(self.labeling, GridIntent) else getattr(self.labeling, "grid", None)
        if L is None and isinstance(grid, GridIntent):
            grid.check_units(x, seen)
        labels = self._labels(x, seen, L)
        if not (labels != ABSTAIN).any():
            raise InvalidInput("all macro-intents are -1: look at what the labeling function says of your tracks.")
        self.label_report_ = _report(labels)
        self.n_agents_, self.n_features_ = x.shape[2:]
        model = self._model(x, seen, int(labels.max()) + 1 if self.labeling is None else self.labeling.classes, seed)
        data = self._tensor(np.where(seen[..., None], x, np.nan), "cpu"), torch.from_numpy(labels)
        draw = generator(seed, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=checks.positive("learning_rate", self.learning_rate))
        steps = checks.integer("max_iter", self.max_iter, least=2)
        every = checks.integer("checkpoint_every", self.checkpoint_every, least=1)
        schedule = warmup_cosine(steps, max(1, steps // 20))
        self.loss_curve_: list[float] = []
        noise = generator(seed, 2, device=self.device)
        training = Training(model, optimizer, {"batches": draw, "latents": noise}, self.loss_curve_)
        if self.checkpoint is not None:
            about = {k: v for k, v in self.get_params().items() if k not in ("checkpoint", "labeling", "device")}
            about |= {
                "the number of macro-intents": model.n_intents,
                "tracks": digest(x, seen),
                "labels": digest(labels),
            }
            resume_training(self.checkpoint, training, about)
        for step in range(len(self.loss_curve_), steps):
            rows = torch.randint(len(x), (batch,), generator=draw)
            start = int(torch.randint(max(1, x.shape[1] - window + 1), (1,), generator=draw))
            part = [v[rows][:, start : start + window].to(self.device) for v in data]
            loss = model.loss(TrackBatch(part[0], part[1]), generator=noise)["loss"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 300.0)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * schedule(step)
            optimizer.step()
            self.loss_curve_.append(float(loss.detach()))
            if self.checkpoint is not None and ((step + 1) % every == 0 or step + 1 == steps):
                save_training(self.checkpoint, training, about)
        self.model_ = model.eval()
        self.health_ = self._health(data, generator(seed, 6, device=self.device))
        return self

    def _health(self, data: tuple[torch.Tensor, torch.Tensor], draw: torch.Generator) -> dict[str, float]:
        batch = TrackBatch(*(v[:64].to(self.device) for v in data))
        labels = batch.intents
        assert labels is not None
        use = self.model_.latent_use(batch, generator=draw)
        floor = self.model_.at_floor(batch, generator=draw)
        with torch.no_grad():
            nats = float(self.model_.intent_nll(batch).sum())
        said = labels[:, :-1][labels[:, :-1] != ABSTAIN]
        share = torch.bincount(said).double() / max(len(said), 1)
        entropy = -float((share[share > 0] * share[share > 0].log()).sum())
        found = {**use, "at floor": floor, "macro": nats / max(len(said), 1), "label entropy": entropy}
        if use["active"] == 0:
            warnings.warn("no dimension of the latents carries anything; see health_.", RuntimeWarning, stacklevel=3)
        if floor > 0.2:
            warnings.warn(
                f"{floor:.0%} of the numbers have a deviation below twice the floor; likelihoods hang on it: do agents "
                "stand still, or are positions rounded (Trajectories.dequantized)?",
                RuntimeWarning,
                stacklevel=3,
            )
        return found

    def _labels(self, x: NDArray, seen: NDArray, L: NDArray | None) -> NDArray[np.int64]:
        if L is None:
            if self.labeling is None:
                raise InvalidInput("give intents to fit, or a labeling function to the estimator.")
            found = self.labeling(x, seen, self.fps)
            if not self.shared_intent:
                return found
            if self.labeling.per_agent:
                raise InvalidInput(f"{self.labeling.name} labels each agent; shared_intent needs one label for all.")
            return np.asarray(found.max(-1))
        labels = np.asarray(L)
        want = x.shape[:2] if self.shared_intent else x.shape[:3]
        if labels.shape != want or labels.dtype.kind not in "iu":
            raise InvalidInput(f"intents must be whole numbers {want}; got {labels.dtype} {labels.shape}.")
        return labels.astype(np.int64)

    def _model(self, x: NDArray, seen: NDArray, classes: int, seed: int) -> MacroVRNN:
        points, both = x[seen], seen[:, 1:] & seen[:, :-1]
        step = np.diff(x, axis=1)[both]
        if not len(step) or not step.std() > 0:
            raise InvalidInput("no agent moves between two frames in which it is seen.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, 0))
            made = MacroVRNN(
                x.shape[2],
                max(classes, 2),
                self.shared_intent,
                dim=x.shape[3],
                hidden=self.hidden,
                rnn=self.rnn,
                z=self.z,
                layers=1,
                min_std=0.02,
                agent_params=self.agent_params,
                context="neighbors" if self.agent_params == "tied" else "joint",
                target="step",
                shift=points.mean(0).tolist(),
                scale=np.maximum(points.std(0), 1e-9).tolist(),
                step_scale=float(step.std()),
            )
        return made.to(self.device)

    def score(self, X: NDArray, L: NDArray | None = None, n_particles: int = 16) -> float:
        """Mean bound of log p(tracks, intents) in nats a sequence, given the first frame, in the tracks' unit."""
        model = self._fitted()
        x, seen, _ = tracks(X)
        labels = torch.from_numpy(self._labels(x, seen, L)).to(self.device)
        batch = TrackBatch(self._tensor(np.where(seen[..., None], x, np.nan), self.device), labels)
        with torch.no_grad():
            found = model.log_likelihood(
                batch, n_particles, generator=generator(self.random_state, 3, device=self.device)
            )
            return float((found - model.intent_nll(batch)).mean())

    def sample(
        self, burn_in: NDArray, steps: int, intents: Any = None, n: int = 1, *, seed: int = 0
    ) -> NDArray[np.float64]:
        """Continue tracks (B, T, K, D) or (T, K, D): (n, B, T + steps, K, D).

        ``intents`` as :meth:`MacroVRNN.sample` takes them; those of the burn-in come from the labeling function, which
        sees the burn-in only.
        """
        model = self._fitted()
        first = self._tensor(burn_in, self.device)
        history = None
        if self.labeling is not None:
            given = np.asarray(burn_in, dtype=np.float64)
            given = given if given.ndim == 4 else given[None]
            found = self.labeling(given, None, self.fps)
            history = found.max(-1) if self.shared_intent else found
        draw = generator(self.random_state, 4, seed, device=self.device)
        x, _ = model.sample(first, steps, intents, n, history=history, generator=draw)
        return x.double().cpu().numpy()

    def predict_proba(self, X: NDArray) -> NDArray[np.float64]:
        """Probabilities of the intents at the last frame of tracks, (N, K, classes), or (N, classes) if shared."""
        model = self._fitted()
        asked: list[torch.Tensor] = []

        def ask(t: int, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
            asked.append(p)
            return p.argmax(-1)

        first = self._tensor(X, self.device)
        history = None if self.labeling is None else self.labeling(np.asarray(X, dtype=np.float64), None, self.fps)
        history = history.max(-1) if history is not None and self.shared_intent else history
        model.sample(first, 1, ask, history=history, generator=generator(self.random_state, 5, device=self.device))
        return asked[0].double().cpu().numpy()

    def _tensor(self, x: Any, device: str) -> torch.Tensor:
        """Positions in double precision, where the device of the model has it: the model takes off its center first."""
        single = torch.device(self.device).type == "mps"
        return torch.as_tensor(np.asarray(x, dtype=np.float32 if single else np.float64), device=device)

    def _fitted(self) -> MacroVRNN:
        if not hasattr(self, "model_"):
            raise InvalidInput("the model is not fitted; call fit(X) first.")
        return self.model_


def _check_digits(given: NDArray, x: NDArray, seen: NDArray) -> None:
    """Refuse positions whose floating type has too few digits for their steps."""
    if given.dtype.kind != "f" or not seen.any():
        return
    moves = np.linalg.norm(np.diff(x, axis=1), axis=-1)[seen[:, 1:] & seen[:, :-1]]
    moves, far = moves[moves > 0], float(np.abs(x[seen]).max())
    digit = float(np.spacing(np.asarray(far, dtype=given.dtype)))
    if len(moves) and digit > 0.1 * float(np.median(moves)):
        raise InvalidInput(
            f"positions come in {given.dtype} and go up to {far:g}, where its last digit is {digit:g}, beside a usual "
            f"step of {np.median(moves):.3g}: give them in double precision, or take their origin off before rounding."
        )


def _report(labels: NDArray) -> dict[str, float]:
    said = labels != ABSTAIN
    both = said[:, 1:] & said[:, :-1]
    same = (labels[:, 1:] == labels[:, :-1]) & both
    return {
        "coverage": float(said.mean()),
        "classes used": float(len(np.unique(labels[said]))),
        "repeat-last accuracy": float(same.sum() / max(both.sum(), 1)),
    }
