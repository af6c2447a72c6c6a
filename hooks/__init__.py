"""Tools that act on the activations of any TransformerLens model at its hook points, and on its
weights during training.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
