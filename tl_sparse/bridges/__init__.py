"""Attacks: prompts on which a circuit errs, found with its program and tried on the model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
