"""Canonical capsules as an estimator: fit clouds, then canonicalize, register, describe and reconstruct others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.data.point_clouds import check_cloud, largest_norm, warn_of_coarse
from mlcollage.errors import InvalidInput
from mlcollage.measure import RigidTransform, all_poses, chamfer_distance, icp, random_rotation, rotation_angle
from mlcollage.measure.registration import covered
from mlcollage.nn import build

from .losses import LossWeights
from .model import CanonicalCapsules, CanonicalOutput
from .training import train_capsules

__all__ = ["CanonicalCapsulesEstimator", "Registration"]

Array = NDArray[np.float64]


class Registration(NamedTuple):
    """A motion between two clouds, and how far it can be trusted.

    Attributes
    ----------
    R, t
        ``source @ R.T + t`` is near the target, in the unit of the clouds.
    rmse
        Root mean squared distance of moved source points from their nearest target points, in the unit of the clouds.
    condition
        From 0 (the capsules determine no rotation) to 1, the lesser of both clouds.
    coverage
        Share of moved source points that have a target point near them, or of target points that have a source point,
        whichever is less; below 0.9 one cloud may be a part of the other.
    mirrored
        Whether in one of the clouds a mirror image would fit its canonical pose better.
    poses
        All motions (R, t, rmse) that fit about as well: several for symmetric objects. Only if asked for.
    bound
        Degrees within which R is right with the probability asked of
        :meth:`CanonicalCapsulesEstimator.calibrate`; NaN without a calibration for this kind of registration.
    """

    R: Array
    t: Array
    rmse: float
    condition: float
    coverage: float
    mirrored: bool
    poses: tuple[tuple[Array, Array, float], ...] = ()
    bound: float = math.nan

    def apply(self, points: Any) -> Array:
        """Move points (N, D)."""
        return np.asarray(points, dtype=np.float64) @ self.R.T + self.t

    @property
    def matrix(self) -> Array:
        """Homogeneous (D + 1, D + 1), applied to columns."""
        dim = len(self.t)
        return np.block([[self.R, self.t[:, None]], [np.zeros((1, dim)), np.ones((1, 1))]])

    @property
    def inverse(self) -> Registration:
        """Target to source."""
        back = self.R.T
        poses = tuple((r.T, -r.T @ t, e) for r, t, e in self.poses)
        return self._replace(R=back, t=-back @ self.t, poses=poses)


class _Calibration(NamedTuple):
    """The quantile, in degrees, of error times condition over clouds that were held out; whether refined; how many."""

    quantile: float
    refined: bool
    clouds: int


class CanonicalCapsulesEstimator(TransformerMixin, BaseEstimator):
    """Learns from point clouds, without labels, to bring them to one pose and to describe them by parts.

    Clouds are an array (S, N, D) or a list of arrays (N_i, D), in any unit: each is centered and scaled by itself for
    the network, in the precision in which it comes, and results are in the unit of the user.

    Parameters
    ----------
    capsules, channels
        K and C; 10 and 32 by default, 10 and 128 in the paper.
    n_points
        Points that are drawn from a cloud for a step of training, 256 by default.
    hidden
        Width of the decoder, 128 by default, 1280 in the paper; 0 leaves reconstruction out, which is faster.
    inputs
        ``"coordinates"`` (default) or ``"distances"``, the exactly invariant encoder; see :class:`CapsuleEncoder`.
    max_iter
        Steps of training, 2,000 by default.
    batch_size, learning_rate
        16 and 2e-3.
    crop
        Largest share of a cloud that is cut off on one side in training, 0 by default; above 0 for partial scans. See
        :func:`train_capsules`.
    weights
        :class:`LossWeights`; the paper's by default.
    random_state
        Seeds weights, order and motions.
    device
        Where to train.

    Attributes
    ----------
    model_ : CanonicalCapsules
        The trained network.
    report_ : TrainingReport
        Losses of each step, skipped steps, and the state of the network; ``print(report_)`` says it in a sentence.
    dim_ : int
        D.

    Examples
    --------
    >>> from mlcollage.data import procedural_shapes
    >>> X = procedural_shapes("plane", 40, 64, dim=2).points
    >>> capsules = CanonicalCapsulesEstimator(capsules=4, channels=8, n_points=64, max_iter=3, random_state=0).fit(X)
    >>> capsules.transform(X).shape, capsules.canonicalize(X)[0][0].shape
    ((40, 40), (64, 2))
    """

    def __init__(
        self,
        capsules: int = 10,
        *,
        channels: int = 32,
        n_points: int = 256,
        hidden: int = 128,
        inputs: Any = "coordinates",
        max_iter: int = 2000,
        batch_size: int = 16,
        learning_rate: float = 2e-3,
        crop: float = 0.0,
        weights: LossWeights | None = None,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.capsules = capsules
        self.channels = channels
        self.n_points = n_points
        self.hidden = hidden
        self.inputs = inputs
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.crop = crop
        self.weights = weights
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any = None) -> CanonicalCapsulesEstimator:
        """Train on clouds; ``y`` is not used."""
        clouds = _clouds(X)
        self.dim_ = clouds[0].shape[1]
        prepared = [torch.from_numpy(_scaled(c)[0]) for c in clouds]
        try:
            seed = int(check_random_state(self.random_state).randint(2**31))
            torch.empty(0, device=self.device)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise InvalidInput(
                f"random_state={self.random_state!r} and device={self.device!r} must be a seed and a device of this "
                f"machine: {str(error).partition(chr(10))[0]}"
            ) from None
        checks.integer("n_points", self.n_points, least=1)
        weights = LossWeights() if self.weights is None else self.weights
        if not self.hidden:
            weights = LossWeights(**{**weights.__dict__, "reconstruction": 0.0})
        smallest = min(map(len, prepared))
        crop = checks.real("crop", self.crop, least=0, most=0.9)
        n = min(self.n_points, smallest - math.floor(crop * smallest))

        def make() -> CanonicalCapsules:
            return CanonicalCapsules(
                self.dim_,
                self.capsules,
                self.channels,
                points=n,
                hidden=self.hidden or 4,
                inputs=self.inputs,
                weights=weights,
            )

        self.model_ = cast(CanonicalCapsules, build(make, seed).to(self.device))
        self.report_ = train_capsules(
            self.model_,
            prepared,
            steps=self.max_iter,
            batch_size=self.batch_size,
            n_points=n,
            learning_rate=self.learning_rate,
            crop=crop,
            seed=seed,
        )
        self.model_.eval()
        self.calibration_: _Calibration | None = None
        return self

    def calibrate(self, X: Any, level: float = 0.9, *, refine: bool = True, random_state: Any = 0) -> float:
        r"""Learn from clouds that were not fitted how far the rotations of :meth:`register` can be trusted.

        Each cloud is registered onto itself in another random pose, where the true motion is known. With
        :math:`e_i` the error in degrees and :math:`c_i` the condition, the split-conformal quantile

        .. math::

            q = \text{the } \lceil (n + 1)\, \text{level} \rceil \text{-th smallest of } e_i\, c_i, \qquad
            \text{bound} = \min(180, q / c)

        holds for a new cloud with probability ``level`` at least, if it is as these are (exchangeable). Two samples of
        one object, or two objects, differ more than a cloud from itself; and symmetric objects have large errors.

        Parameters
        ----------
        X
            Clouds, best some dozens; with fewer than level / (1 - level) the bound is 180 degrees.
        level
            Probability of the bound, 0.9 by default.
        refine
            As it will be asked of :meth:`register`; only such registrations get the bound.
        random_state
            Seeds the poses.

        Returns
        -------
        float
            q, in degrees.

        References
        ----------
        Lei, G'Sell, Rinaldo, Tibshirani and Wasserman, "Distribution-Free Predictive Inference for Regression", JASA
        113 (2018), section 5.2.
        """
        check_is_fitted(self, "model_")
        checks.probability("level", level)
        clouds = _clouds(X)
        draw = generator(int(check_random_state(random_state).randint(2**31)), 3)
        turns = random_rotation(len(clouds), self.dim_, generator=draw, dtype=torch.float64).numpy()
        scores = []
        for cloud, r in zip(clouds, turns, strict=True):
            about = cloud - cloud.mean(0)
            found = self._registered(about, about @ r.T, refine, False, "mlcollage")
            angle = rotation_angle(torch.from_numpy(found.R), torch.from_numpy(r))
            scores.append(math.degrees(float(angle)) * found.condition)
        rank = math.ceil((len(scores) + 1) * level)
        quantile = sorted(scores)[rank - 1] if 0 < rank <= len(scores) else (0.0 if rank == 0 else math.inf)
        self.calibration_ = _Calibration(quantile, refine, len(clouds))
        return quantile

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Descriptors and canonical poses of clouds: (S, K C + K D).

        Descriptors are those of the cloud in canonical pose where there is a decoder; poses are taken relative to their
        bounding box, as the official code does before it classifies.
        """
        rows = []
        for out, _ in self._run(X):
            beta = out.capsules.beta if out.descriptors is None else out.descriptors
            theta = out.pose.transform.apply(out.capsules.theta)[0]
            low, high = theta.min(0).values, theta.max(0).values
            box = (theta - (low + high) / 2) / (high - low).max().clamp_min(1e-6)
            rows.append(torch.cat([beta[0].flatten(), box.flatten()]).cpu().numpy())
        return np.stack(rows)

    def canonicalize(self, X: Any) -> tuple[list[Array], Array, Array]:
        """Clouds in canonical pose, in their unit, and the motions R (S, D, D) and t (S, D) that took them there."""
        moved, rotations, shifts = [], [], []
        for (out, frame), cloud in zip(self._run(X), _clouds(X), strict=True):
            r, t = _in_units(out, *frame)
            moved.append(cloud @ r.T + t)
            rotations.append(r)
            shifts.append(t)
        return moved, np.stack(rotations), np.stack(shifts)

    def attention(self, X: Any) -> list[NDArray[np.float32]]:
        """Attention (N_i, K) of each point; its ``argmax`` is the point's part."""
        return [out.capsules.attention[0].cpu().numpy() for out, _ in self._run(X)]

    def reconstruct(self, X: Any) -> list[Array]:
        """Clouds drawn by the decoder, in the pose and unit of the clouds that came.

        Raises
        ------
        InvalidInput
            If the estimator was made without a decoder (``hidden=0``).
        """
        drawn = []
        for out, frame in self._run(X):
            if out.decoded is None:
                raise InvalidInput("this estimator has no decoder (hidden=0); make one with hidden=128 to reconstruct.")
            r, t = _in_units(out, *frame)
            points = out.decoded[0].flatten(0, 1).double().cpu().numpy() * frame[1]
            drawn.append((points - t) @ r)
        return drawn

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the mean Chamfer distance (both directions, squared) of reconstructions, for clouds of unit radius."""
        found = []
        for out, _ in self._run(X):
            if out.decoded is None:
                raise InvalidInput("this estimator has no decoder (hidden=0), so reconstructions have no score.")
            found.append(float(chamfer_distance(out.decoded.flatten(1, 2), out.canonical)))
        return -float(np.mean(found))

    def register(
        self, source: Any, target: Any, *, refine: bool = True, symmetric: bool = False, engine: Any = "mlcollage"
    ) -> Registration:
        """The motion that takes one cloud onto another of the same kind of object.

        Both are brought to canonical pose, and the motions are chained: no start value is needed.

        Parameters
        ----------
        source, target
            Clouds (N, D) and (M, D).
        refine
            Whether iterative closest points follow (default).
        symmetric
            Whether to look for all motions that fit about as well, as symmetric objects have them.
        engine
            Of the closest points, as for :func:`~mlcollage.measure.icp`: ``"auto"`` takes Open3D where it is installed.

        Warns
        -----
        UserWarning
            Where, refined, less than 70 % of the points of one cloud have a neighbor in the other: the network was
            trained on whole clouds (or with ``crop``), and a part shifts the mean and the pose. Of eight planes of
            which half was given, four had such a coverage: without a warning, too, a part may be registered wrongly.
        """
        found = self._registered(source, target, refine, symmetric, engine)
        if refine and found.coverage < 0.7:
            trained = f"crops of up to {self.crop:.0%}" if self.crop else "whole clouds; crop=0.3 also trains on parts"
            warnings.warn(
                f"only {found.coverage:.0%} of the points of one cloud have a neighbor in the other when registered: "
                f"the motion is wrong, or one is a part of the other. The network was trained on {trained}.",
                stacklevel=2,
            )
        return found

    def _registered(self, source: Any, target: Any, refine: bool, symmetric: bool, engine: Any) -> Registration:
        pair = [_one_cloud(name, x) for name, x in (("source", source), ("target", target))]
        (out_a, frame_a), (out_b, frame_b) = self._run(pair)
        (ra, ta), (rb, tb) = _in_units(out_a, *frame_a), _in_units(out_b, *frame_b)
        r = rb.T @ ra
        motion = RigidTransform(torch.from_numpy(r), torch.from_numpy(rb.T @ (ta - tb)))
        a, b = (torch.from_numpy(x - pair[1].mean(0)) for x in pair)  # near the origin, whatever the coordinates
        center = torch.from_numpy(pair[1].mean(0))
        near = RigidTransform(motion.R, motion.t + motion.R @ center - center)
        best = icp(a, b, near, max_iter=50, engine=engine).transform if refine else near
        moved = best.apply(a)
        rmse = float(chamfer_distance(moved, b, direction="x_to_y").sqrt())
        poses = all_poses(a, b, best) if symmetric else []

        def away(m: RigidTransform) -> tuple[Array, Array]:
            return m.R.numpy(), (m.t - m.R @ center + center).numpy()

        coverage = min(float(covered(x[None], y[None])) for x, y in ((moved, b), (b, moved)))
        condition = float(min(o.pose.condition.item() for o in (out_a, out_b)))
        known = getattr(self, "calibration_", None)
        bound = math.nan
        if known is not None and known.refined == refine:
            bound = min(180.0, known.quantile / condition) if condition > 0 else 180.0
        return Registration(
            *away(best),
            rmse=rmse,
            condition=condition,
            coverage=coverage,
            mirrored=bool(out_a.pose.mirrored.item() or out_b.pose.mirrored.item()),
            poses=tuple((*away(m), e) for m, e in poses),
            bound=bound,
        )

    def _run(self, X: Any) -> list[tuple[CanonicalOutput, tuple[Array, float]]]:
        """The model's output for each cloud by itself, with the center and scale that it was prepared by."""
        check_is_fitted(self, "model_")
        found = []
        mode = self.model_.training
        self.model_.eval()
        try:
            with torch.no_grad():
                for i, cloud in enumerate(_clouds(X)):
                    if cloud.shape[1] != self.dim_:
                        raise InvalidInput(
                            f"cloud {i} has {cloud.shape[1]} coordinates; the estimator was fitted to {self.dim_}."
                        )
                    x, center, scale = _scaled(cloud)
                    found.append((self.model_(torch.from_numpy(x)[None].to(self.device)), (center, scale)))
        finally:
            self.model_.train(mode)
        return found


def _one_cloud(name: str, X: Any) -> Array:
    clouds = _clouds(X)
    if len(clouds) > 1:
        raise InvalidInput(f"{name} must be one cloud (N, D); got {len(clouds)} of them: register them one by one.")
    return clouds[0]


def _clouds(X: Any) -> list[Array]:
    """Clouds as a list of float64 arrays, checked; a single one (N, D) is a list of one."""
    if isinstance(X, Tensor):
        X = X.detach().cpu().numpy()
    if isinstance(X, np.ndarray) and X.ndim == 2:
        X = [X]
    if not isinstance(X, np.ndarray | Sequence) or isinstance(X, str) or not len(X):
        raise InvalidInput(f"clouds must be an array (S, N, D) or a list of (N, D) arrays; got {type(X).__name__}.")
    clouds = [check_cloud(c, f"cloud {i}") for i, c in enumerate(X)]
    if len({c.shape[1] for c in clouds}) > 1:
        raise InvalidInput("clouds must all have 2 coordinates or all 3; these are mixed.")
    warn_of_coarse(clouds, "point clouds")
    return [c.astype(np.float64) for c in clouds]


def _scaled(cloud: Array) -> tuple[NDArray[np.float32], Array, float]:
    """About its mean and of unit radius, with that mean and radius."""
    center = cloud.mean(0)
    x = cloud - center
    scale = largest_norm(x)
    return (x / scale).astype(np.float32), center, scale


def _in_units(out: CanonicalOutput, center: Array, scale: float) -> tuple[Array, Array]:
    """R and t of the motion into canonical pose, in the unit of the cloud."""
    r, t = (x[0].double().cpu().numpy() for x in (out.pose.R, out.pose.t))
    return r, scale * t - r @ center
