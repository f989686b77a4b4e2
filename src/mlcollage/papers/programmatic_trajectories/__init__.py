"""Multi-agent trajectories from programmatic weak supervision: cheap labels, a macro model and one VRNN per agent.

Labeling functions turn tracks into macro-intents; a recurrent network learns how intents follow each other, and each
agent's variational recurrent network moves by them (Zhan, Zheng, Yue, Sha and Lucey, "Generating Multi-Agent
Trajectories using Programmatic Weak Supervision", ICLR 2019).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
