"""Everything that acts on activations or weights during a run, by hook name, on any TransformerLens
model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
