"""From a model and a task to the circuit (Gao et al. 2025, sections 2.2 and A.5)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
