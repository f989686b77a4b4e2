"""Networks that return their intermediate activations by name: MLP, convolutional network, ResNet, ViT."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
