from .bridge import SparseArchitectureAdapter as SparseArchitectureAdapter
from .choose import wrap as wrap
from .line import transformer_lens_line as transformer_lens_line
from .model import SparseModel as SparseModel
