"""How the symmetries of a network are found.

From the graph:

1. ``tracing``: ``torch.export`` gives the network as a graph of aten operators.
2. ``structure``: a walk over the graph (``walk``) gives every entry an unknown degree and asks each operator, by its
   rule in ``pointwise`` or ``products``, for linear equations between them (``degrees``).
3. ``families``: the null space of all equations, its basis grouped into families of like laws.
4. ``laws``: a family written as a scale or rescale symmetry, or as a matrix symmetry.
5. ``shifts``: translations, by a walk back from the operators that forget a shift.

By numbers: ``probe`` draws batches and gradients, ``confirm`` accepts or rejects laws, ``detect`` finds some without a
graph.
"""
