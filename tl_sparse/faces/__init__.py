"""The network as a true TransformerLens model.

It is a `HookedTransformer` on TransformerLens 3 and a `TransformerBridge` on TransformerLens 4.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
