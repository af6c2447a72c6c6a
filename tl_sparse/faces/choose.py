"""The choice of the model class (face) for the installed version of TransformerLens."""

from transformers import PreTrainedTokenizerBase

from tl_sparse.config import check
from tl_sparse.faces.line import transformer_lens_line
from tl_sparse.faces.model import SparseModel
from tl_sparse.network import SparseTransformer


def wrap(
    network: SparseTransformer, tokenizer: PreTrainedTokenizerBase | None = None
) -> SparseModel:
    """The network as a model of the installed version of TransformerLens, in eval mode.

    Raises:
        ConfigError: if `network` is not a `SparseTransformer`.
        TokenizerError: if `tokenizer` is not a tokenizer, or does not fit.
    """
    check(isinstance(network, SparseTransformer), "network", network, "a SparseTransformer")
    if transformer_lens_line() == 3:
        from tl_sparse.faces.hooked import SparseHookedTransformer as Face
    else:
        from tl_sparse.faces.bridge import SparseTransformerBridge as Face
    return Face(network.eval(), tokenizer).eval()
