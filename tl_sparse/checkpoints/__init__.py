"""Reading and writing models: on disk, on the Hugging Face hub and in OpenAI's storage.

Models are read in every supported format, and written in our own.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
