"""The settings of :class:`~mlcollage.data.glyphs.GlyphWorld`, checked, with the alphabet that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch

from mlcollage import _checks as checks
from mlcollage.data._glyph_alphabet import make_alphabet
from mlcollage.errors import InvalidInput

_MOST = {  # of the numbers from 0
    "rotation": 180.0, "shift": 1.0, "aspect": 1.0, "shear": 1.0, "jitter": 0.5, "texture": 1.0, "background": 1.0,
    "noise": 1.0, "spurious": 1.0, "label_noise": 1.0,
}  # fmt: skip
_MOST_OF_PAIRS = {"scale": 2.0, "width": 0.5, "contrast": 1.8}


@dataclass(eq=False)
class GlyphSettings:
    """What the images of a world are made of; :class:`~mlcollage.data.glyphs.GlyphWorld` says what each means.

    Attributes
    ----------
    alphabet_vertices, alphabet_segments, alphabet_lengths
        ``(k, 10, 2)`` float32, ``(k, 5, 2)`` and ``(k,)`` int64: the skeletons of the ``k`` classes, see
        :class:`~mlcollage.data._glyph_alphabet.Alphabet`.
    """

    size: int = 32
    channels: int = 3
    num_classes: int = 10
    _: KW_ONLY
    alphabet_seed: int = 0
    seed: int = 0
    device: str | torch.device = "cpu"
    rotation: float = 20.0
    shift: float = 0.15
    scale: tuple[float, float] = (0.65, 1.0)
    aspect: float = 0.15
    shear: float = 0.2
    jitter: float = 0.09
    width: tuple[float, float] = (0.06, 0.13)
    clutter: int = 3
    contrast: tuple[float, float] = (0.45, 1.0)
    texture: float = 0.2
    background: float = 0.25
    noise: float = 0.05
    occluders: int = 0
    spurious: float = 0.0
    spurious_cue: Literal["color", "position"] = "color"
    label_noise: float = 0.0
    imbalance: float = 1.0
    shape: tuple[int, ...] = field(init=False, repr=False)
    likeness: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        self.shape = (self.channels, self.size, self.size)
        alphabet = make_alphabet(self.num_classes, seed=self.alphabet_seed, rotation=self.rotation)
        self.likeness = alphabet.likeness
        self.alphabet_vertices = torch.from_numpy(alphabet.vertices).float()
        self.alphabet_segments = torch.from_numpy(alphabet.segments)
        self.alphabet_lengths = torch.from_numpy(alphabet.lengths)

    def _check(self) -> None:
        """Refuse settings that give no image, or not the one that was meant."""
        for name, least, most in (("size", 16, 64), ("num_classes", 2, 64), ("clutter", 0, 16), ("occluders", 0, 4)):
            checks.integer(name, getattr(self, name), least=least, most=most)
        for name in ("seed", "alphabet_seed"):
            checks.integer(name, getattr(self, name))
        if self.channels not in (1, 3):
            raise InvalidInput(f"channels must be 1 (gray) or 3 (RGB); got {self.channels!r}.")
        for name, high in _MOST.items():
            checks.real(name, getattr(self, name), least=0, most=high)
        checks.real("imbalance", self.imbalance, least=1, most=1e4)
        for name, high in _MOST_OF_PAIRS.items():
            pair = getattr(self, name)
            if not isinstance(pair, Sequence) or len(pair) != 2 or pair[0] > pair[1]:
                raise InvalidInput(f"{name} must be a pair (smallest, largest); got {pair!r}.")
            checks.real(name, pair[0], least=0, most=high)
            checks.real(name, pair[1], above=0, most=high)
        checks.choice("spurious_cue", self.spurious_cue, ("color", "position"))
        if self.spurious and self.spurious_cue == "color" and self.channels == 1:
            raise InvalidInput("a color cue needs channels=3; for gray images use spurious_cue='position'.")
