r"""Rigid motions of point sets: the best one between two sets (orthogonal Procrustes), random ones, and their angles.

A motion maps a point x, as a column, to R x + t: a turn by 90 degrees about z sends (1, 0, 0) to (0, 1, 0). Clouds hold
points as rows, (N, D), so that they are moved by ``points @ R.mT + t``. D is 2 or 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from scipy.special import erfcinv
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

__all__ = [
    "Procrustes",
    "RigidTransform",
    "mean_rotation",
    "procrustes",
    "random_rotation",
    "rotation_angle",
    "symmetric_angle",
]

Sampler = Literal["haar", "official"]
_ROUNDINGS = 64.0  # a sum of singular values below so many roundings of the spread determines no rotation


class RigidTransform(NamedTuple):
    """A motion x -> R x + t, or a batch of them.

    Attributes
    ----------
    R
        Rotations (..., D, D), applied to columns.
    t
        Translations (..., D).

    Examples
    --------
    >>> quarter = RigidTransform(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.zeros(2))
    >>> quarter.apply(torch.tensor([[1.0, 0.0]])).tolist()
    [[0.0, 1.0]]
    >>> torch.equal(quarter.inverse().apply(quarter.apply(torch.eye(2))), torch.eye(2))
    True
    """

    R: Tensor
    t: Tensor

    def apply(self, points: Tensor) -> Tensor:
        """Move points (..., N, D)."""
        return points @ self.R.mT.to(points.dtype) + self.t[..., None, :].to(points.dtype)

    def inverse(self) -> RigidTransform:
        """The motion that undoes this one."""
        back = self.R.mT
        return RigidTransform(back, -(back @ self.t[..., None])[..., 0])

    def after(self, first: RigidTransform) -> RigidTransform:
        """The two motions as one, ``first`` first: ``a.after(b).apply(x) == a.apply(b.apply(x))``."""
        return RigidTransform(self.R @ first.R, (self.R @ first.t[..., None])[..., 0] + self.t)

    def matrix(self) -> Tensor:
        """Homogeneous matrices (..., D + 1, D + 1), applied to columns (x, 1)."""
        last = torch.zeros_like(self.R[..., :1, :])
        top = torch.cat([self.R, self.t[..., None]], -1)
        return torch.cat([top, torch.cat([last, torch.ones_like(last[..., :1])], -1)], -2)


class Procrustes(NamedTuple):
    """What :func:`procrustes` finds.

    Attributes
    ----------
    R, t
        The motion: rotations (..., D, D) and translations (..., D).
    residual
        Weighted mean squared distance that is left, (...), in squared units of the points.
    condition
        (...), from 0 (the rotation is not determined: points on a line, or in one place) to 1 (all directions are as
        well determined): the smallest sum of two signed singular values of H over the largest sum of two.
    defined
        (...), whether the rotation is unique. Where it is not, R is the identity and has no gradient.
    mirrored
        (...), whether a reflection would fit better than R does. A rotation is returned all the same.
    singular_values
        Those of H, (..., D), the largest first.
    """

    R: Tensor
    t: Tensor
    residual: Tensor
    condition: Tensor
    defined: Tensor
    mirrored: Tensor
    singular_values: Tensor

    @property
    def transform(self) -> RigidTransform:
        """R and t as a motion."""
        return RigidTransform(self.R, self.t)


def procrustes(
    p: Tensor,
    q: Tensor,
    weights: Tensor | None = None,
    *,
    allow_reflection: bool = False,
    eps: float | None = None,
    check: bool = True,
) -> Procrustes:
    r"""The rigid motion that carries points p onto their partners q with the least squared error.

    .. math::

        (R, t) = \operatorname{argmin}_{R \in SO(D),\, t} \sum_k w_k \|R p_k + t - q_k\|^2, \qquad
        H = \sum_k w_k (p_k - \bar p)(q_k - \bar q)^\top = U S V^\top, \qquad
        R = V \operatorname{diag}(1, \dots, \det(V U^\top))\, U^\top, \quad t = \bar q - R \bar p

    The gradient is not that of the decomposition, which is NaN where singular values are equal, but that of R itself:
    with :math:`P = R^\top H^\top` a change dH turns R by :math:`R\,\Omega`, where
    :math:`\Omega P + P\,\Omega = R^\top dH^\top - dH\, R`. It exists wherever R is unique, that is, wherever the sums
    of two (signed) singular values are above 0, and may be differentiated again.

    Parameters
    ----------
    p, q
        Partners (..., K, D), row k of one belonging to row k of the other; D is 2 or 3.
    weights
        (..., K), at least 0, in any unit; equal by default.
    allow_reflection
        Take the best orthogonal matrix instead, whose determinant may be -1.
    eps
        The rotation counts as undefined where the smallest sum of two signed singular values is below ``eps`` times the
        product of both sets' root mean squared radii; by default 64 roundings of the points' type.
    check
        Look at the values, and refuse what is not finite. False inside ``torch.func.vmap`` and compiled regions.

    Returns
    -------
    Procrustes
        In the type of the points; half precision is computed in float32, and decompositions of the small H in float64
        where the device has it.

    Raises
    ------
    InvalidInput
        For shapes that do not fit, D other than 2 or 3, fewer than two points, values that are not finite (the message
        names the items of the batch), and weights that are negative or sum to 0.

    References
    ----------
    W. Kabsch, "A solution for the best rotation to relate two sets of vectors", Acta Crystallographica A32 (1976);
    "Canonical Capsules", arXiv:2012.04718, section 3.

    Examples
    --------
    >>> p = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> found = procrustes(p, p @ turn.T + 3.0)
    >>> found.R.round(decimals=5).add(0.0).tolist(), found.t.round(decimals=5).tolist()
    ([[0.0, -1.0], [1.0, 0.0]], [3.0, 3.0])
    """
    w = _checked_pair(p, q, weights, check)
    if eps is not None:
        eps = checks.real("eps", eps, least=0)
    dtype = p.dtype
    with torch.autocast(p.device.type, enabled=False):
        work = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        p, q, w = (x.to(work) for x in (p, q, w))
        w = w / w.sum(-1, keepdim=True)
        mean_p, mean_q = ((w[..., None] * x).sum(-2) for x in (p, q))  # (..., D)
        centered_p, centered_q = p - mean_p[..., None, :], q - mean_q[..., None, :]
        h = (w[..., None] * centered_p).mT @ centered_q  # (..., D, D), rows are the source's
        if check and not bool(h.isfinite().all()):
            raise InvalidInput(f"products of coordinates overflow in {work}; divide p and q by their size first.")
        with torch.no_grad():
            spread = [(w * x.square().sum(-1)).sum(-1).sqrt() for x in (centered_p, centered_q)]
            limit = (_ROUNDINGS * torch.finfo(work).eps if eps is None else eps) * spread[0] * spread[1]
            svd = _Decomposition.of(h, limit, allow_reflection)
        r = _Rotation.apply(h, svd.R, svd.defined)
        t = mean_q - (r @ mean_p[..., None])[..., 0]
        residual = (w * (centered_p @ r.mT - centered_q).square().sum(-1)).sum(-1)
    found = (r, t, residual, svd.condition)
    cast = [x.to(dtype) for x in found]
    return Procrustes(cast[0], cast[1], cast[2], cast[3], svd.defined, svd.mirrored, svd.singular_values.to(dtype))


def _checked_pair(p: Tensor, q: Tensor, weights: Tensor | None, check: bool) -> Tensor:
    for name, x in (("p", p), ("q", q)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or x.shape[-1] not in (2, 3):
            what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInput(f"{name} must be floating points (..., K, 2) or (..., K, 3), one a row; got {what}.")
    if p.shape != q.shape or p.dtype != q.dtype:
        raise InvalidInput(
            f"p and q must be partners of one shape and type; got {tuple(p.shape)} {p.dtype} and {tuple(q.shape)} "
            f"{q.dtype}."
        )
    if p.shape[-2] < 2:
        raise InvalidInput(f"a rotation needs at least two points; p has {p.shape[-2]}.")
    w = p.new_ones(p.shape[:-1]) if weights is None else weights
    if not isinstance(w, Tensor) or not w.is_floating_point() or w.shape != p.shape[:-1]:
        raise InvalidInput(f"weights must be a floating tensor {tuple(p.shape[:-1])}, one for each point.")
    if not check:
        return w
    bad = ~(p.isfinite().all(-1) & q.isfinite().all(-1) & w.isfinite()).all(-1)
    if bool(bad.any()):
        raise InvalidInput(f"points or weights are NaN or infinite in {_items(bad)}; leave these points out.")
    wrong = (w < 0).any(-1) | (w.sum(-1) <= 0)
    if bool(wrong.any()):
        raise InvalidInput(f"weights must be at least 0, with a sum above 0; they are not in {_items(wrong)}.")
    return w


def _items(which: Tensor) -> str:
    if which.ndim == 0:
        return "the pair"
    found = [tuple(i) if len(i) > 1 else i[0] for i in which.nonzero().tolist()]
    return f"item {', '.join(map(str, found[:5]))}{' and others' if len(found) > 5 else ''} of the batch"


class _Decomposition(NamedTuple):
    R: Tensor
    condition: Tensor
    defined: Tensor
    mirrored: Tensor
    singular_values: Tensor

    @classmethod
    def of(cls, h: Tensor, limit: Tensor, allow_reflection: bool) -> _Decomposition:
        wide = h if h.device.type == "mps" else h.double()
        u, s, vh = torch.linalg.svd(wide)
        sign = torch.linalg.det(vh.mT @ u.mT).sign()  # (...)
        signed = s.clone()
        if not allow_reflection:
            signed[..., -1] = s[..., -1] * sign
        flip = torch.ones_like(s)
        flip[..., -1] = flip[..., -1] if allow_reflection else sign
        r = (vh.mT * flip[..., None, :]) @ u.mT
        least, most = signed[..., -2] + signed[..., -1], s[..., 0] + s[..., 1]
        defined = least > limit
        eye = torch.eye(h.shape[-1], dtype=r.dtype, device=r.device)
        r = torch.where(defined[..., None, None], r, eye)
        condition = torch.where(most > 0, least / most.clamp_min(torch.finfo(most.dtype).tiny), torch.zeros_like(most))
        mirrored = (sign < 0) & (s[..., -1] > limit)
        return cls(r.to(h.dtype), condition.clamp(0, 1).to(h.dtype), defined, mirrored, s.to(h.dtype))


class _Rotation(torch.autograd.Function):
    """R of H with the gradient of R itself; R and where it is defined come from the decomposition."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, r: Tensor, defined: Tensor) -> Tensor:
        return r.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        h, r, defined = inputs
        ctx.save_for_backward(h, r, defined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        h, r, defined = ctx.saved_tensors
        # R depends on H here too, so that a second derivative finds it.
        r = _Rotation.apply(h, r, defined)
        p = r.mT @ h.mT  # P, symmetric (..., D, D)
        b = r.mT @ grad
        trace = p.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        if h.shape[-1] == 2:
            # An antisymmetric matrix is a multiple of J = ((0, -1), (1, 0)); P J + J P = tr(P) J.
            total = torch.where(defined[..., None, None], trace, torch.ones_like(trace))
            w = ((b[..., 1, 0] - b[..., 0, 1])[..., None, None] / total)[..., 0, 0]
            omega = torch.stack([torch.zeros_like(w), -w, w, torch.zeros_like(w)], -1).reshape(h.shape)
        else:
            # As axial vectors: Omega P + P Omega is (tr(P) - P) omega.
            eye = torch.eye(3, dtype=h.dtype, device=h.device)
            system = torch.where(defined[..., None, None], trace * eye - (p + p.mT) / 2, eye)
            axial = torch.stack(
                [b[..., 2, 1] - b[..., 1, 2], b[..., 0, 2] - b[..., 2, 0], b[..., 1, 0] - b[..., 0, 1]], -1
            )
            x, y, z = torch.linalg.solve(system, axial[..., None])[..., 0].unbind(-1)
            o = torch.zeros_like(x)
            omega = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).reshape(h.shape)
        along = (r @ omega).mT  # dL = <R Omega, dH'>
        return torch.where(defined[..., None, None], along, torch.zeros_like(along)), None, None


def rotation_angle(a: Tensor, b: Tensor | None = None) -> Tensor:
    r"""Angle between rotations, in radians from 0 to :math:`\pi`.

    .. math::

        \alpha(A, B) = \operatorname{atan2}\bigl(\|\operatorname{axis}(C - C^\top)\|,\ \operatorname{tr} C - 1\bigr),
        \qquad C = A^\top B

    For D = 2 cosine and sine are read off C. Unlike the arc cosine of the trace, this is exact for small angles too.

    Parameters
    ----------
    a, b
        Rotations (..., D, D), D being 2 or 3; without ``b`` the angle of ``a`` itself.

    Examples
    --------
    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> torch.rad2deg(rotation_angle(turn)).item(), rotation_angle(turn, turn).item()
    (90.0, 0.0)
    """
    for name, x in (("a", a), ("b", b)):
        if x is not None and (not isinstance(x, Tensor) or x.ndim < 2 or tuple(x.shape[-2:]) not in ((2, 2), (3, 3))):
            raise InvalidInput(f"{name} must be rotations (..., 2, 2) or (..., 3, 3); got {_what(x)}.")
        if x is not None and not x.is_floating_point():
            raise InvalidInput(f"{name} must be floating rotations; got {_what(x)}.")
    if b is not None and (a.dtype != b.dtype or a.device != b.device or a.shape[-1] != b.shape[-1]):
        raise InvalidInput(f"a and b must agree in dimension, type and device; got {_what(a)} and {_what(b)}.")
    c = a if b is None else a.mT @ b
    trace = c.diagonal(dim1=-2, dim2=-1).sum(-1)
    if c.shape[-1] == 2:
        return torch.atan2((c[..., 1, 0] - c[..., 0, 1]).abs(), trace)
    axis = torch.stack([c[..., 2, 1] - c[..., 1, 2], c[..., 0, 2] - c[..., 2, 0], c[..., 1, 0] - c[..., 0, 1]], -1)
    return torch.atan2(axis.norm(dim=-1), trace - 1)


def symmetric_angle(a: Tensor, b: Tensor, order: int, axis: Sequence[float] = (0.0, 0.0, 1.0)) -> Tensor:
    r"""Angle between poses of an object that looks alike after some turns about an axis of its own.

    .. math::

        \alpha_G(A, B) = \min_{g \in G} \alpha(A g, B)

    where G holds the turns by multiples of 360 / ``order`` degrees; with ``order=0`` all turns, and the angle is that
    between the axes, :math:`\alpha(A e, B e)`.

    Parameters
    ----------
    a, b
        Rotations (..., D, D) from the object to the two poses, D being 2 or 3.
    order
        Of the group: 1 is no symmetry (then this is :func:`rotation_angle`), 2 a table's half turn, 4 a square
        table's, 0 a bottle's.
    axis
        e, in the object, for D = 3; z by default.

    Returns
    -------
    Tensor
        In radians, (...). Give it beside the angle without symmetry, and name the group.

    Examples
    --------
    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> symmetric_angle(torch.eye(2), turn, 4).item(), symmetric_angle(torch.eye(2), -turn, 1).item() > 1.5
    (0.0, True)
    """
    checks.integer("order", order, least=0)
    plain = rotation_angle(a, b)  # looks at a and b
    dim = a.shape[-1]
    if order == 1:
        return plain
    if dim == 2:
        if order == 0:
            return torch.zeros_like(plain)
        turn = 2 * math.pi / order
        return (plain - turn * (plain / turn).round()).abs()
    e = torch.as_tensor(axis, dtype=a.dtype, device=a.device)
    if e.shape != (3,) or not bool(e.isfinite().all()) or not bool(e.norm() > 0):
        raise InvalidInput(f"axis must be a direction of three finite numbers that are not all 0; got {axis!r}.")
    e = e / e.norm()
    if order == 0:
        u, v = a @ e, b @ e
        return torch.atan2(torch.linalg.cross(u, v).norm(dim=-1), (u * v).sum(-1))
    x, y, z = e.unbind()
    o = torch.zeros_like(x)
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o]).reshape(3, 3)
    level = 2 * math.pi * torch.arange(order, dtype=a.dtype, device=a.device)[:, None, None] / order
    turns = torch.eye(3, dtype=a.dtype, device=a.device) + level.sin() * cross + (1 - level.cos()) * (cross @ cross)
    moved = a[..., None, :, :] @ turns  # (..., order, 3, 3)
    return rotation_angle(moved, b[..., None, :, :].expand_as(moved)).amin(-1)


def _what(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def mean_rotation(rotations: Tensor) -> Tensor:
    """The rotation nearest to the arithmetic mean of rotations (n, D, D): their chordal mean.

    Raises
    ------
    InvalidInput
        For what is no stack of finite rotations, and where the mean is not determined (a turn and its opposite).

    Examples
    --------
    >>> a = math.radians(40)
    >>> left = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    >>> rotation_angle(mean_rotation(torch.stack([left, left.T]))).item() < 1e-6
    True
    """
    if not isinstance(rotations, Tensor) or rotations.ndim != 3 or tuple(rotations.shape[1:]) not in ((2, 2), (3, 3)):
        raise InvalidInput(f"rotations must be (n, 2, 2) or (n, 3, 3); got {_what(rotations)}.")
    if not rotations.is_floating_point() or not bool(rotations.isfinite().all()):
        raise InvalidInput(f"rotations must be finite floating numbers; got {_what(rotations)}.")
    if not len(rotations):
        raise InvalidInput("there is no rotation to take the mean of; give at least one.")
    u, s, vh = torch.linalg.svd(rotations.double().mean(0))
    flip = torch.ones(vh.shape[-1], dtype=u.dtype, device=u.device)
    flip[-1] = torch.linalg.det(u @ vh)
    if float(s[-2] + flip[-1] * s[-1]) <= _ROUNDINGS * torch.finfo(rotations.dtype).eps:
        raise InvalidInput("these rotations have no mean: they point in opposite directions, and several are as near.")
    return ((u * flip) @ vh).to(rotations.dtype)


def random_rotation(
    n: int,
    dim: int = 3,
    *,
    generator: torch.Generator | None = None,
    sampler: Sampler = "haar",
    limit: float = 180.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Random rotations (n, D, D).

    Parameters
    ----------
    n, dim
        How many, and D: 2 or 3.
    generator
        A ``torch.Generator`` on the CPU, from which the numbers come; torch's global one by default.
    sampler
        ``"haar"`` (default): uniform; in three dimensions the angle is 126.5 degrees in the mean. ``"official"``: as
        the official code of Canonical Capsules draws in three dimensions, a quaternion whose scalar part is
        :math:`\pi \operatorname{erf}^{-1}` in place of :math:`\sqrt 2 \operatorname{erf}^{-1}` of a uniform number.
        That leans to the identity: 94.7 degrees in the mean. In two dimensions both are the same.
    limit
        Largest angle in degrees, for the official sampler in three dimensions only.
    dtype, device
        Of the result; the draws are the same for all.

    Raises
    ------
    InvalidInput
        For ``n`` below 1, other dimensions, a limit that is not within (0, 180] or not 180 for the uniform sampler,
        what is no generator of torch's, and types that are not floating.

    Examples
    --------
    >>> r = random_rotation(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> round(float(torch.rad2deg(rotation_angle(r)).mean())) in (125, 126, 127, 128)
    True
    """
    checks.integer("n", n, least=1)
    checks.choice("sampler", sampler, ("haar", "official"))
    if dim not in (2, 3):
        raise InvalidInput(f"dim must be 2 or 3, not {dim!r}.")
    limit = checks.real("limit", limit, above=0, most=180)
    if limit < 180 and (sampler != "official" or dim == 2):
        raise InvalidInput("a limit below 180 degrees is for sampler='official' in three dimensions only.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidInput(f"dtype must be a floating type such as torch.float32, not {dtype!r}.")
    if generator is not None:
        checks.generator(generator)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    if dim == 2:
        angle = 2 * math.pi * torch.rand(n, **options)
        c, s = angle.cos(), angle.sin()
        r = torch.stack([c, -s, s, c], -1).reshape(n, 2, 2)
    elif sampler == "haar":
        r = _of_quaternions(torch.randn(n, 4, **options))
    else:
        normal, uniform = torch.randn(n, 3, **options), torch.rand(n, **options)
        positive = torch.rand(n, **options) < 0.5
        r = _official(normal, uniform, positive, limit)
    return r.to(dtype=dtype, device=device)


def _official(normal: Tensor, uniform: Tensor, positive: Tensor, limit: float) -> Tensor:
    """The official code's rotations of its draws: vector part (n, 3), level of the scalar part (n,), sign (n,)."""
    least = normal.norm(dim=1) / math.tan(math.radians(limit) / 2)  # of the scalar part, for the largest angle
    tail = uniform * torch.erfc(least / math.pi)  # as small as 1e-15 for a narrow limit: hence erfc and its inverse
    scalar = math.pi * torch.from_numpy(erfcinv(tail.numpy()))
    return _of_quaternions(torch.cat([normal, torch.where(positive, scalar, -scalar)[:, None]], 1))


def _of_quaternions(q: Tensor) -> Tensor:
    """Rotations (n, 3, 3) of quaternions (n, 4), the scalar part last, of any length."""
    x, y, z, w = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
