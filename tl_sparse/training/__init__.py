"""Weight-sparse training (Gao et al. 2025, sections 2.1 and A.2)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
