"""Self-supervised capsules for point clouds: parts with a pose and a descriptor, brought to one canonical pose.

Attention splits a cloud into capsules; their poses turn with the cloud and their descriptors do not, and both together
bring it to a pose that all views of an object share (Sun, Tagliasacchi, Deng, Sabour, Yazdani, Hinton and Yi,
"Canonical Capsules: Self-Supervised Capsules in Canonical Pose", NeurIPS 2021).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
