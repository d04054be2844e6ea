"""For processes that tests start: Keras finds one backend and nothing else to import.

Keras imports other backends, scikit-learn and pandas where they are installed, which
takes longer than most of these processes. Python imports this when it starts.
"""

import os
import sys

for name in ("tensorflow", "jax", "torch", "sklearn", "pandas", "matplotlib"):
    if name != os.environ["KERAS_BACKEND"]:
        sys.modules[name] = None  # type: ignore[assignment]
