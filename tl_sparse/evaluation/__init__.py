"""Scoring a model under a circuit, which shows whether the circuit is sufficient and necessary."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
