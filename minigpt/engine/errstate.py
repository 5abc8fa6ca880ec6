"""NumPy's treatment of underflow and the like: the caller's `np.seterr` must not decide what a model computes.

In a softmax, exp underflows all the time, and is meant to.
"""

import numpy as np

# Decorates what computes: NumPy's own defaults, per thread, about 1 µs a call.
numpy_defaults = np.errstate(divide="warn", over="warn", under="ignore", invalid="warn")
