r"""Wrong labels on purpose, with a record of which.

Symmetric noise replaces a label by one of the others, each as likely; pair noise by the next class. The two kinds are
those of Patrini et al., CVPR 2017, arXiv:1609.03683, and Han et al., NeurIPS 2018, arXiv:1804.06872.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput


def add_label_noise(
    y: npt.ArrayLike,
    rate: float,
    kind: Literal["symmetric", "pair"] = "symmetric",
    *,
    num_classes: int | None = None,
    rng: np.random.Generator | int = 0,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Replace a share of the labels by wrong ones.

    Exactly ``round(rate * n)`` labels are changed, drawn without replacement, and every one of them to a *different*
    class. (Where a noisy label may by chance be the true one, a rate of r of ours is r * C / (C - 1) of theirs.)

    Parameters
    ----------
    y
        Class numbers (n,), integers from 0; a tensor on the CPU will do.
    rate
        Share of labels to change, 0 to 1.
    kind
        ``"symmetric"``: to any other class, each as likely. ``"pair"``: to the next class, the last to the first.
    num_classes
        C; None (default) for the largest label and one.
    rng
        Generator or seed.

    Returns
    -------
    noisy : ndarray of int64, (n,)
        The labels to train on; ``y`` itself is not changed.
    mask : ndarray of bool, (n,)
        Which labels were changed.

    Raises
    ------
    InvalidInput
        For labels that are not class numbers, a rate outside [0, 1], or fewer than two classes.
    UnknownName
        For another kind.

    Examples
    --------
    >>> noisy, mask = add_label_noise([0, 1, 2, 0, 1, 2], 0.5, rng=1)
    >>> int(mask.sum()), bool((noisy[mask] != np.array([0, 1, 2, 0, 1, 2])[mask]).all())
    (3, True)
    >>> add_label_noise([0, 1, 2], 1.0, "pair")[0].tolist()
    [1, 2, 0]
    """
    clean = np.asarray(y)
    if clean.ndim != 1 or not np.issubdtype(clean.dtype, np.integer) or (len(clean) and clean.min() < 0):
        raise InvalidInput(f"y must hold class numbers (n,), integers from 0; got {clean.dtype} of {clean.shape}.")
    rate = checks.probability("rate", rate, inside=False)
    kind = checks.choice("kind", kind, ("symmetric", "pair"))
    classes = num_classes if num_classes is not None else int(clean.max(initial=-1)) + 1
    if len(clean) and clean.max() >= classes:
        raise InvalidInput(f"y holds the label {clean.max()}, but num_classes is {classes}.")
    chosen = round(rate * len(clean))
    if chosen and classes < 2:
        raise InvalidInput("with one class there is no wrong label; label noise needs at least two.")
    rng = np.random.default_rng(rng)
    # The mask first, then the new labels: the same labels are chosen for both kinds of noise.
    mask = np.zeros(len(clean), dtype=bool)
    mask[rng.permutation(len(clean))[:chosen]] = True
    shift = np.ones(chosen, dtype=np.int64) if kind == "pair" else rng.integers(1, max(classes, 2), size=chosen)
    # Shifts of 1 to C - 1 reach every class but the true one.
    noisy = clean.astype(np.int64)
    noisy[mask] = (noisy[mask] + shift) % classes
    return noisy, mask
