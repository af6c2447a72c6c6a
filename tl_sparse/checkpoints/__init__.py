"""Models on disk, on the Hugging Face hub and on OpenAI's storage: read whatever wrote them, and
written.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
