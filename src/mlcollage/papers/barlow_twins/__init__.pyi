from .loss import BarlowTerms as BarlowTerms
from .loss import BarlowTwinsLoss as BarlowTwinsLoss
from .loss import barlow_twins_loss as barlow_twins_loss
from .loss import standardize as standardize

__all__ = ["BarlowTerms", "BarlowTwinsLoss", "barlow_twins_loss", "standardize"]
