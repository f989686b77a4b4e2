"""Random changes of inputs that keep their labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput


def shift_images(x: Tensor, most: int, *, generator: torch.Generator, fill: float | None = None) -> Tensor:
    r"""Each image moved by a random number of pixels, up, down and sideways; content is as far as it can be seen.

    .. math:: x'_{n c i j} = x_{n, c, i + a_n, j + b_n}, \qquad a_n, b_n \sim U\{-m, \dots, m\}.

    Parameters
    ----------
    x
        Images (n, channels, h, w).
    most
        m, the largest move in each direction.
    generator
        Draws the moves where it is, so that they do not depend on where the images are.
    fill
        Value beyond the edge; None repeats the edge.

    Raises
    ------
    InvalidInput
        If x is not made of images.

    Examples
    --------
    >>> x = torch.arange(9.0).reshape(1, 1, 3, 3)
    >>> shift_images(x, 1, generator=torch.Generator().manual_seed(1), fill=-1.0)[0, 0].tolist()
    [[1.0, 2.0, -1.0], [4.0, 5.0, -1.0], [7.0, 8.0, -1.0]]
    """
    if x.ndim != 4:
        raise InvalidInput(f"x has shape {tuple(x.shape)}; images (n, channels, h, w) are needed.")
    checks.integer("most", most, least=0)
    n, _, h, w = x.shape
    move = torch.randint(-most, most + 1, (2, n, 1), generator=generator, device=generator.device).to(x.device)
    if fill is None:
        padded = F.pad(x, (most,) * 4, mode="replicate")
    else:
        padded = F.pad(x, (most,) * 4, value=fill)
    rows = torch.arange(most, h + most, device=x.device) + move[0]  # (n, h), into the padded image
    columns = torch.arange(most, w + most, device=x.device) + move[1]  # (n, w)
    index = torch.arange(n, device=x.device)[:, None, None]
    # Indexed with channels last, (n, h, w, c), so that the three index arrays broadcast to (n, h, w).
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
