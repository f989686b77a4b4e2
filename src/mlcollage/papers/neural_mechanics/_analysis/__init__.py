"""How the symmetries of a network are found.

From the graph:

1. ``tracing``: ``torch.export`` gives the network as a graph of aten operators.
2. ``structure``: a walk over the graph (``walk``) gives every entry an unknown degree and an unknown shift, by which
   an entry x changes by d x + s, and asks each operator, by its rule in ``pointwise`` or ``products``, for linear
   equations between them (``degrees``; ``carriers`` for what shifts are multiplied by on their way).
3. ``families``: the null space of all equations, its basis grouped into families of like laws.
4. ``laws``: a family written as a translation, scale or rescale symmetry, or as a matrix symmetry.

By numbers: ``probe`` draws batches and gradients, ``confirm`` accepts or rejects laws, ``detect`` finds some without a
graph.
"""
