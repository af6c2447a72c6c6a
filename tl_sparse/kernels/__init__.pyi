from .dispatch import bits as bits
from .dispatch import in_torch_func as in_torch_func
from .dispatch import kernel as kernel
from .dispatch import n_threads as n_threads
from .dispatch import shared_out as shared_out
