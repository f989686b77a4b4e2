"""Self-supervised learning by redundancy reduction: two views of a sample agree, and columns of the embedding differ.

The loss draws the cross-correlation matrix of the two views' embeddings to the identity (Zbontar, Jing, Misra, LeCun
and Deny, "Barlow Twins", ICML 2021).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
