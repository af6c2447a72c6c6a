"""Pruning many times: for lists of tasks and models, and to search for good settings."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
