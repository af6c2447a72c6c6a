"""The network, written once, with HookedTransformer's hook points, parameter names and shapes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
