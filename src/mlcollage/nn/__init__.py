"""Networks that return their intermediate activations by name: MLP, convolutional network, ResNet, ViT."""
