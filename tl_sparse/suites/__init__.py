"""Many prunings: every task of a list, and the search for the settings that suit a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
