"""Posterior inference for any log-density: one module per method, chains as the leading dimension, explicit state.

The samplers ``hmc`` and ``nuts`` and variational inference, ``vi``, are modules, since their functions share names
(``hmc.sample``, ``nuts.sample``, ``vi.fit``); every other public name is a class or a function.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
