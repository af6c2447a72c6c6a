"""The network as a true TransformerLens model: `HookedTransformer` on line 3, `TransformerBridge`
on line 4.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
