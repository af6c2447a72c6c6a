"""Explanations: what each node of a circuit computes, as an expression over the tokens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
