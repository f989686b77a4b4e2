"""Meta-learned bidirectional update rules (Sandler et al., ICML 2021): learning without gradients, by a small genome.

| name | what it does |
| --- | --- |
| :class:`BlurClassifier` | scikit-learn classifier that learns in a few steps by a genome of your choice |
| :class:`BlurNetwork` | the same for your network: ``learn(x, y)`` in place of loss, backward and optimizer |
| :class:`Genome` | an update rule, or a population of them; saved and loaded, some are shipped |
| :class:`MetaTrainer` | trains genomes by gradients, persistent evolution strategies or CMA-ES |
| :class:`ArrayTasks` | tasks from your own data; :class:`ToyTasks`: functions of two numbers |
| :func:`compare_optimizers` | genomes beside tuned SGD, SGD with batch norm and Adam |
| :func:`update_asymmetry` | is an update the gradient of any loss |
| :func:`check_backprop_identity` | is the backprop genome equal to SGD, on your layers |
| :func:`functional_step` | one step as a pure function, for ``torch.func`` |
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
