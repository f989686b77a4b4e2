"""Goals that nobody wrote down: Alice sets them by acting, Bob learns to reach them, and clones her where he fails.

Asymmetric self-play (Plappert et al., "Asymmetric self-play for automatic goal discovery in robotic manipulation",
2021): a game for any world whose state can be saved and restored, a loss for any PPO, and small worlds to try both in.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
