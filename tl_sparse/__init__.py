"""Weight-sparse transformers as TransformerLens models: load, train, prune to circuits.

What users may import is listed in `__init__.pyi`, here and in every folder. It is imported when it
is first used, so that `import tl_sparse` is fast and changes nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
