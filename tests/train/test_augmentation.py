import numpy as np
import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.train import shift_images


@pytest.mark.parametrize("fill", [None, -1.0])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_images_are_moved_as_a_loop_over_pixels_moves_them(most, fill):
    x = torch.rand(5, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    moved = shift_images(x, most, generator=torch.Generator().manual_seed(1), fill=fill)
    moves = torch.randint(-most, most + 1, (2, 5, 1), generator=torch.Generator().manual_seed(1))[..., 0]
    for n, c, i, j in np.ndindex(*x.shape):
        a, b = i + int(moves[0, n]), j + int(moves[1, n])
        inside = 0 <= a < 4 and 0 <= b < 3
        expected = x[n, c, min(max(a, 0), 3), min(max(b, 0), 2)] if inside or fill is None else fill
        assert moved[n, c, i, j] == expected


def test_only_images_are_moved():
    with pytest.raises(InvalidInput, match=r"images .* are needed"):
        shift_images(torch.zeros(3, 4), 1, generator=torch.Generator())
