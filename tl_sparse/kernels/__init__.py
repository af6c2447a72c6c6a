"""Compiled kernels: for CPUs where numba is installed (`pip install tl-sparse[fast]`), and for GPUs
where Triton is.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
