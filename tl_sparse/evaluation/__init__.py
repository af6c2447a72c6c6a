"""Is a circuit sufficient, and is it necessary? Scores of a model under a circuit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
