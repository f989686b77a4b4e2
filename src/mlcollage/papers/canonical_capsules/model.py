r"""The whole model: capsules, canonical pose and reconstruction, trained from pairs of motions without labels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure import RigidTransform, chamfer_distance, random_rotation

from ._clouds import check_clouds, check_features
from .canonicalizer import Canonicalizer, CanonicalPose
from .decoder import PatchDecoder
from .encoder import CapsuleEncoder, CapsuleOutput, Inputs, pool_capsules
from .losses import (
    LossWeights,
    canonical_loss,
    equilibrium_loss,
    equivariance_loss,
    invariance_loss,
    localization_loss,
)

__all__ = ["CanonicalCapsules", "CanonicalOutput", "random_motion"]


class CanonicalOutput(NamedTuple):
    """What the model says of a batch of clouds.

    Attributes
    ----------
    capsules
        Poses, descriptors and attention of the clouds as they came.
    pose
        The motion of each into canonical pose.
    canonical
        The clouds in canonical pose, (B, N, D).
    decoded
        Reconstructions in canonical pose, (B, K, M, D); None for a model without a decoder.
    descriptors
        Of the clouds in canonical pose, (B, K, C), from which the decoder draws; None without one.
    """

    capsules: CapsuleOutput
    pose: CanonicalPose
    canonical: Tensor
    decoded: Tensor | None
    descriptors: Tensor | None


def random_motion(
    n: int, dim: int = 3, *, shift: float = 0.2, generator: torch.Generator | None = None, **options: Any
) -> RigidTransform:
    """Random motions of n clouds: a rotation, and a translation within ``shift`` along each axis.

    Parameters
    ----------
    n, dim
        How many, and D.
    shift
        Largest translation, 0.2 by default as in the official code.
    generator
        A ``torch.Generator`` on the CPU.
    **options
        ``sampler``, ``limit``, ``dtype`` and ``device`` of :func:`~mlcollage.measure.random_rotation`.

    Examples
    --------
    >>> random_motion(4, 2, generator=torch.Generator().manual_seed(0)).t.abs().max().item() <= 0.2
    True
    """
    checks.real("shift", shift, least=0)
    rotation = random_rotation(n, dim, generator=generator, **options)
    draws = 2 * torch.rand(n, dim, generator=generator, dtype=torch.float64) - 1
    return RigidTransform(rotation, (shift * draws).to(rotation))


class CanonicalCapsules(nn.Module):
    r"""Self-supervised capsules in canonical pose.

    Each training cloud P is moved twice at random. Poses must move with it (equivariance), descriptors must not change
    (invariance), the canonicalizer must find its own canonical poses again (canonical), capsules are to be of like mass
    (equilibrium) and compact (localization), and the first view, brought to canonical pose, must be reconstructed from
    its capsules (Chamfer distance).

    Parameters
    ----------
    dim
        D, 2 or 3.
    capsules, channels
        K = 10 and C = 128 in the paper.
    points
        Points of a cloud that the decoder draws: K patches of ``points // K``.
    hidden, codes
        Width of the decoder's first layer and numbers of a learned code, 1280 and 10 in the paper.
    blocks, inputs, extra
        As for :class:`CapsuleEncoder`.
    normals
        Whether the network sees normals beside the points: the first D columns of the features (B, N, D + extra). They
        turn with the cloud, in both views and into canonical pose, and are not shifted; the others stay.
    weights
        Of the losses; those of the paper by default. With ``LossWeights(reconstruction=0)`` there is no decoder and no
        second encoder: the pose path alone.
    canonicalize
        False is the paper's ablation without canonicalizer: the cloud is reconstructed as it came, but for its mean.
    shift, sampler
        Of the random motions of training: :func:`random_motion`.

    Notes
    -----
    The model is trained by ``model(points, losses=True, generator=...)``, which returns a dictionary of unweighted
    losses and their weighted ``total``. That is a forward pass, so that wrappers such as ``DistributedDataParallel``
    see it; :meth:`losses` is the same for a bare model. Points are best about a unit in radius: losses have units.

    Raises
    ------
    InvalidInput
        For settings and clouds that cannot be used.

    References
    ----------
    Sun, Tagliasacchi, Deng, Sabour, Yazdani, Hinton and Yi, "Canonical Capsules: Self-Supervised Capsules in Canonical
    Pose", NeurIPS 2021, arXiv:2012.04718, section 3.

    Examples
    --------
    >>> model = CanonicalCapsules(dim=2, capsules=4, channels=8, points=32, hidden=16)
    >>> points = torch.randn(3, 32, 2, generator=torch.Generator().manual_seed(0))
    >>> sorted(model.losses(points, generator=torch.Generator().manual_seed(1)))
    ['canonical', 'equilibrium', 'equivariance', 'invariance', 'localization', 'reconstruction', 'total']
    >>> model.eval()(points).canonical.shape
    torch.Size([3, 32, 2])
    """

    def __init__(
        self,
        dim: int = 3,
        capsules: int = 10,
        channels: int = 128,
        *,
        points: int = 1024,
        hidden: int = 1280,
        codes: int = 10,
        blocks: int = 3,
        inputs: Inputs = "coordinates",
        extra: int = 0,
        normals: bool = False,
        weights: LossWeights | None = None,
        canonicalize: bool = True,
        shift: float = 0.2,
        sampler: Any = "haar",
    ) -> None:
        super().__init__()
        self.weights = LossWeights() if weights is None else weights
        if not isinstance(self.weights, LossWeights):
            raise InvalidInput(f"weights must be LossWeights, e.g. LossWeights(equilibrium=0), not {weights!r}.")
        self.dim, self.shift = dim, checks.real("shift", shift, least=0)
        self.sampler = checks.choice("sampler", sampler, ("haar", "official"))
        self.normals = normals
        if not isinstance(normals, bool):
            raise InvalidInput(f"normals must be True or False, not {normals!r}; they come with each call.")
        if normals and inputs == "distances":
            raise InvalidInput("normals turn with the cloud, and inputs='distances' takes only what does not.")
        make = {
            "blocks": blocks,
            "inputs": inputs,
            "extra": checks.integer("extra", extra, least=0) + (dim if normals else 0),
        }
        self.encoder = CapsuleEncoder(dim, capsules, channels, **make)  # type: ignore[arg-type]
        self.canonicalizer = Canonicalizer(dim, capsules, channels) if canonicalize else None
        self.second_encoder: CapsuleEncoder | None = None
        self.decoder: PatchDecoder | None = None
        if self.weights.reconstruction:
            self.second_encoder = CapsuleEncoder(dim, capsules, channels, **make)  # type: ignore[arg-type]
            # The official code makes the readout of the second encoder too, and does not use it.
            self.second_encoder.readout.requires_grad_(False)
            self.decoder = PatchDecoder(dim, capsules, channels, points=points, hidden=hidden, codes=codes)

    def forward(
        self,
        points: Tensor,
        mask: Tensor | None = None,
        features: Tensor | None = None,
        *,
        losses: bool = False,
        motions: tuple[RigidTransform, RigidTransform] | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Bring clouds to canonical pose, or (``losses=True``) compute the training losses of two moved views.

        Parameters
        ----------
        points
            Clouds (B, N, D).
        mask
            Boolean (B, N), False at padding.
        features
            Extra features (B, N, extra) of a model that was made for them; with ``normals=True`` (B, N, D + extra), the
            normals first.
        losses
            Whether to return the losses, a dictionary, instead of :class:`CanonicalOutput`.
        motions, generator
            For the losses: the two motions, or a generator on the CPU to draw them from.
        """
        check_clouds(points, self.dim, self.encoder.capsules, mask)
        if mask is not None:
            points = torch.where(mask[..., None], points, torch.zeros_like(points))  # padding may hold anything
        if losses:
            return self._losses(points, mask, features, motions, generator)
        capsules = self.encoder(points, mask, features)
        pose = self._pose(capsules)
        return CanonicalOutput(capsules, pose, *self._reconstruct(points, capsules, pose, mask, features))

    def losses(
        self,
        points: Tensor,
        mask: Tensor | None = None,
        features: Tensor | None = None,
        *,
        motions: tuple[RigidTransform, RigidTransform] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """``forward(..., losses=True)``: each loss without its weight, and the weighted ``total``."""
        return self(points, mask, features, losses=True, motions=motions, generator=generator)

    def draw_motions(
        self, points: Tensor, generator: torch.Generator | None = None
    ) -> tuple[RigidTransform, RigidTransform]:
        """Two random motions of each cloud."""
        drawn = random_motion(
            2 * len(points),
            self.dim,
            shift=self.shift,
            generator=generator,
            sampler=self.sampler,
            dtype=points.dtype,
            device=points.device,
        )
        first, second = (RigidTransform(*parts) for parts in zip(*(x.chunk(2) for x in drawn), strict=True))
        return first, second

    def _pose(self, capsules: CapsuleOutput) -> CanonicalPose:
        if self.canonicalizer is not None:
            return self.canonicalizer(capsules)
        # Without it: the cloud stays as it came, about the mean of its poses.
        theta = capsules.theta
        mean, one = theta.mean(1), theta.new_ones(len(theta))
        eye = torch.eye(self.dim, dtype=theta.dtype, device=theta.device).expand(len(theta), -1, -1)
        yes = torch.ones(len(theta), dtype=torch.bool, device=theta.device)
        return CanonicalPose(eye, -mean, theta - mean[:, None], 0 * one, one, yes, ~yes)

    def _turned(self, features: Tensor, r: Tensor) -> Tensor:
        """Features (B, N, D + extra) with their normals turned by rotations (B, D, D)."""
        if not self.normals or features.ndim != 3 or len(features) != len(r):  # what does not fit, the encoder refuses
            return features
        normals, rest = features[..., : self.dim], features[..., self.dim :]
        return torch.cat([normals @ r.mT.to(normals.dtype), rest], -1)

    def _reconstruct(
        self,
        points: Tensor,
        capsules: CapsuleOutput,
        pose: CanonicalPose,
        mask: Tensor | None,
        features: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Clouds in canonical pose, their reconstruction, and the descriptors it is drawn from."""
        canonical = pose.transform.apply(points)
        if self.decoder is None or self.second_encoder is None:
            return canonical, None, None
        seen = None if features is None else self._turned(features, pose.R)
        f = self.second_encoder.point_features(canonical, mask, seen)
        beta = pool_capsules(capsules.attention, f, mask)
        theta = pool_capsules(capsules.attention, canonical, mask)
        return canonical, self.decoder(theta, beta), beta

    def _checked_motions(self, motions: Any, points: Tensor) -> tuple[RigidTransform, RigidTransform]:
        shapes = (len(points), self.dim, self.dim), (len(points), self.dim)
        fit = isinstance(motions, tuple | list) and len(motions) == 2
        if not fit or not all(
            isinstance(m, RigidTransform) and (tuple(m.R.shape), tuple(m.t.shape)) == shapes for m in motions
        ):
            raise InvalidInput(
                f"motions must be two RigidTransforms with R {shapes[0]} and t {shapes[1]}, one motion for each cloud."
            )
        return motions[0], motions[1]

    def _losses(
        self,
        points: Tensor,
        mask: Tensor | None,
        features: Tensor | None,
        motions: tuple[RigidTransform, RigidTransform] | None,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        a, b = self._checked_motions(motions, points) if motions is not None else self.draw_motions(points, generator)
        size, w = len(points), self.weights
        views = torch.cat([a.apply(points), b.apply(points)])  # (2 B, N, D), the first view before the second
        twice = None if mask is None else torch.cat([mask, mask])
        seen = None
        if features is not None:
            features = check_features(features, points, mask)
            features = self._turned(features, a.R)  # from here on of the first view
            seen = torch.cat([features, self._turned(features, b.after(a.inverse()).R)])
        both = self.encoder(views, twice, seen)
        theta_a, theta_b = both.theta.chunk(2)
        pose = self._pose(both)
        terms: dict[str, Tensor] = {}
        if w.equivariance:
            terms["equivariance"] = equivariance_loss(theta_a, theta_b, a, b)
        if w.invariance:
            terms["invariance"] = invariance_loss(*both.beta.chunk(2))
        if w.canonical and self.canonicalizer is not None:
            terms["canonical"] = canonical_loss(both.theta, pose.theta_bar, pose.transform)
        if w.equilibrium:
            terms["equilibrium"] = equilibrium_loss(both.attention, twice)
        if w.localization:
            terms["localization"] = localization_loss(both.attention, views, twice)
        if w.reconstruction:
            first = CapsuleOutput(*(x[:size] for x in both))
            view, of_first = views[:size], CanonicalPose(*(x[:size] for x in pose))
            canonical, decoded, _ = self._reconstruct(view, first, of_first, mask, features)
            assert decoded is not None
            lengths = None
            if mask is not None:
                order = (~mask).to(torch.uint8).sort(dim=1, stable=True).indices  # real points first
                canonical = canonical.gather(1, order[..., None].expand_as(canonical))
                lengths = mask.sum(1)
            terms["reconstruction"] = chamfer_distance(decoded.flatten(1, 2), canonical, y_lengths=lengths)
        if not terms:
            raise InvalidInput("all weights of the losses are 0; there is nothing to train.")
        total = torch.stack([getattr(w, name) * value for name, value in terms.items()]).sum()
        return {**terms, "total": total}
