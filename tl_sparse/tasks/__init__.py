"""Tasks: pairs of prompts, each with a choice between two next tokens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
