from mlcollage.infer import *  # noqa: F403 (the gathered packages name what they have)
from mlcollage.stats import *  # noqa: F403
