"""`SparseModel`, the part that the model classes (faces) for both TransformerLens versions share.

`hooked.py` (TransformerLens 3) and `bridge.py` (TransformerLens 4) add only the differences.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.utilities.tokenize_utils import get_attention_mask
from transformers import PreTrainedTokenizerBase

from tl_sparse.arrays import as_integers, as_mask, as_tokens, check_vocabulary
from tl_sparse.errors import DataError, TokenizerError, UnsupportedError
from tl_sparse.faces.cache import SparseActivationCache
from tl_sparse.faces.model_card import model_facts
from tl_sparse.faces.tl_config import tensor_config_fields
from tl_sparse.faces.tokens import prepare_tokenizer
from tl_sparse.files import write_json
from tl_sparse.hooks import is_sharded
from tl_sparse.network import SparseConfig, SparseTransformer, Stream, Tokens
from tl_sparse.precision import in_float32

#: TransformerLens' options to process the weights of a model when it is loaded.
_PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


class SparseModel(nn.Module):
    """Base class that both faces list before TransformerLens' own model class.

    A face holds the modules of the network as its own children, so on both versions its hook names,
    parameter names and `state_dict` keys are those of the network.
    """

    #: The folder that the model was loaded from, or that training wrote it to.
    folder: Path | None = None
    network: SparseTransformer
    embed: Any
    tokenizer: Any
    cfg: Any
    W_U: Any
    loss_fn: Any

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # The network is what runs. If a tool such as SAELens replaces a module of the face, the
        # network must get the replacement too.
        if isinstance(value, nn.Module) and name in self.__dict__.get("_network_children", ()):
            setattr(self.network, name, value)

    def adopt_network(self, flags: Any) -> None:
        """Make the modules of the network children of this model, under the same names.

        Args:
            flags: TransformerLens' configuration, whose flags control the optional hook points.
        """
        self.network.follow(flags)
        children = dict(self.network.named_children())
        for name, child in children.items():
            setattr(self, name, child)
        self.__dict__["_network_children"] = set(children)

    @classmethod
    def from_pretrained(cls, source: str | Path, *args: Any, **kwargs: Any) -> Any:
        """The same call as `tl_sparse.load`.

        Raises:
            UnsupportedError: if one of TransformerLens' options to process weights is on.
        """
        if any(kwargs.pop(name, False) for name in _PROCESSING):
            cls._refuse_processing()
        # An upward import, which tests/test_rooms.py lists as an exception.
        from tl_sparse.checkpoints import load

        return load(source, *args, **kwargs)

    from_pretrained_no_processing = from_pretrained

    def set_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, default_padding_side: str | None = None
    ) -> None:
        """Give the model a tokenizer, checked and completed by `prepare_tokenizer`."""
        prepared, prepends_bos = prepare_tokenizer(tokenizer, self.cfg.d_vocab)
        if default_padding_side:
            prepared.padding_side = default_padding_side
        self.tokenizer = prepared
        self.cfg.tokenizer_prepends_bos = prepends_bos

    def to_tokens(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' method: text → tokens [batch, pos].

        Raises:
            TokenizerError: if the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise TokenizerError(
                "this model has no tokenizer, so it takes only token ids; set_tokenizer gives it "
                "one"
            )
        return super().to_tokens(input, *args, **kwargs)  # type: ignore[misc]

    @property
    def sparse_cfg(self) -> SparseConfig:
        """The architecture; `model.cfg` is TransformerLens' view of it."""
        return self.network.cfg

    @property
    def device(self) -> torch.device:
        """The device of the weights; tools such as captum and pyvene move their inputs to it."""
        return self.network.embed.W_E.device

    def save_pretrained(
        self, folder: str | Path, dense: bool = False, overwrite: bool = False
    ) -> None:
        """Write the model for `tl_sparse.load`.

        The files are `config.json`, `model.safetensors` and, if the model has one, the tokenizer.
        Either all of them are written or none.

        Args:
            folder: created if it does not exist.
            dense: whether zeros are stored too. Other readers of safetensors files can then read
                the weights; otherwise, zeros take no space.
            overwrite: whether another model in `folder` is replaced. Saving the same model again
                is always possible.

        Raises:
            CheckpointError: if the files cannot be written, or `folder` holds a model of another
                format.
            ConfigError: if `folder` holds another model, and `overwrite` is False.
            UnsupportedError: if the weights are sharded over processes.
        """
        if any(map(is_sharded, self.parameters())):
            raise UnsupportedError(
                "the weights are sharded over processes; training saves such a model in its folder "
                "`out`, from which tl_sparse.load opens it whole"
            )
        from tl_sparse.checkpoints import save_model  # an upward import, as above

        state = self.state_dict()
        save_model(Path(folder), state, self.sparse_cfg, self.tokenizer, dense, overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        record: Mapping[str, Any] | None = None,
        dense: bool = False,
        **options: Any,
    ) -> str:
        """Upload the model, as `save_pretrained` writes it, with a card.

        Args:
            repo_id: `"user/repo"`, created if it does not exist; the card in it is replaced.
            record: the record of the training run, for the card: the return value of `train`, which
                is also in its `training.json`.
            dense: as in `save_pretrained`.
            options: `private`, `revision`, `token` and `commit_message`; see
                `tl_sparse.checkpoints.push_folder`.

        Returns:
            The repository's address.

        Raises:
            CheckpointError: if the hub cannot be reached or refuses the upload.
        """
        from tl_sparse.checkpoints import push_folder  # an upward import, as above

        def write(folder: Path) -> None:
            self.save_pretrained(folder, dense)
            if record is not None:
                write_json(folder / "training.json", record)

        def card(full_name: str) -> str:
            return self.card(full_name, record)

        return push_folder(repo_id, write, card, **options)

    def card(self, repo_id: str, record: Mapping[str, Any] | None = None) -> str:
        """The README.md for the model's repository; see `push_to_hub`.

        It says what the model is, how it was trained and how to load it.
        """
        from tl_sparse.checkpoints import card_text  # an upward import, as above

        return card_text(
            repo_id,
            what="A weight-sparse transformer",
            facts=model_facts(repr(self), self.sparse_cfg, record or {}),
            load=f'model = tl_sparse.load("{repo_id}")',
            pipeline_tag="text-generation",
        )

    def forward(
        self,
        input: str | list[str] | Tokens | Stream,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Tokens | None = None,
        attention_mask: Tokens | None = None,
        position_ids: Tokens | None = None,
        stop_at_layer: int | None = None,
    ) -> Any:
        """Run the model, with the signature of `HookedTransformer.forward` on both versions.

        Args:
            input: text, tokens, or the residual stream entering block `start_at_layer`. Tokens
                may be a tensor, a NumPy array or nested lists of integers.
            return_type: "logits", "loss", "both" or None.
            loss_per_token: whether the loss is that of each position instead of the mean.
            prepend_bos: whether text is tokenized with a first token; None means TransformerLens'
                default.
            padding_side: where texts of different lengths are padded; None means the same.
            start_at_layer: the first block to run; `input` is then the residual stream.
            tokens: the tokens that belong to the residual stream in `input`; the loss, the bigram
                table and padding on the left need them.
            attention_mask: 1 for real tokens, 0 for padding. By default, it is computed if the
                tokenizer pads on the left.
            position_ids: the position of each token; by default 0, 1, …
            stop_at_layer: the block to stop before; its input, the residual stream, is returned.

        Raises:
            DataError: for an input that does not fit the model, missing `tokens`, or an unknown
                `return_type`.
            TokenizerError: for text, if the model has no tokenizer.
        """
        _check_return_type(return_type)
        _check_padding_side(padding_side)
        _check_layer("start_at_layer", start_at_layer, self.sparse_cfg.n_layers)
        _check_layer("stop_at_layer", stop_at_layer, self.sparse_cfg.n_layers)
        needs_mask = attention_mask is None and self._pads_left(padding_side)
        resid = None
        if start_at_layer is None:
            tokens = self._input_tokens(input, prepend_bos, padding_side)
        else:
            resid = _input_resid(input)
            reads_tokens = self.sparse_cfg.bigram_table or return_type in ("loss", "both")
            are_read = needs_mask or (reads_tokens and stop_at_layer is None)
            tokens = self._tokens_behind(resid, tokens, are_read)
        if needs_mask:
            attention_mask = self._mask_padding(tokens, prepend_bos)
        device = self.network.embed.W_E.device
        tokens = tokens.to(device)
        if attention_mask is not None:
            attention_mask = as_mask(attention_mask).to(device)
        if position_ids is not None:
            position_ids = as_integers("position_ids", position_ids).to(device)
        self.network.check_input(tokens, resid, attention_mask, position_ids)
        blocks = dict(start_at_layer=start_at_layer, stop_at_layer=stop_at_layer)
        out = self.network(tokens, attention_mask, position_ids, resid=resid, **blocks)
        if stop_at_layer is not None or return_type == "logits":
            return out
        if return_type is None:
            return None
        loss = self.loss_fn(in_float32(out), tokens.to(out.device), attention_mask, loss_per_token)
        return loss if return_type == "loss" else (out, loss)

    def _input_tokens(
        self, input: Any, prepend_bos: bool | None, padding_side: str | None
    ) -> Tokens:
        """Tokens [batch, pos] from an input of `forward`: text, a list of texts, or tokens."""
        if not _is_text(input):
            return self._token_ids(input)
        tokens: Tensor = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
        return tokens

    def _prompt(self, input: Any) -> Any:
        """An input of `generate` in a form that TransformerLens' own method accepts."""
        is_embedding = isinstance(input, Tensor) and input.is_floating_point()
        if _is_text(input) or is_embedding:
            return input
        return self._token_ids(input)

    def _token_ids(self, input: object) -> Tokens:
        """Token ids in any kind of array as a tensor `[batch, pos]`.

        Raises:
            DataError: for anything else. Ids outside the vocabulary are found only if they are on
                the CPU; on a GPU, torch would abort the process for them.
        """
        is_list = isinstance(input, Sequence) and not isinstance(input, str | bytes)
        if not isinstance(input, Tensor | np.ndarray) and not (is_list and input):
            raise DataError(
                f"the input must be text, a list of texts, or token ids, not {type(input).__name__}"
            )
        tokens = as_tokens(input)
        if tokens.device.type == "cpu" and self.network.embed.W_E.device.type != "cpu":
            check_vocabulary(tokens, self.sparse_cfg.d_vocab)
        return tokens

    def _tokens_behind(self, resid: Stream, tokens: object, are_read: bool) -> Tokens:
        """The tokens behind a residual stream; zeros if none are given and none are read."""
        if tokens is not None:
            return self._token_ids(tokens)
        if are_read:
            raise DataError(
                "start_at_layer needs tokens=…: the loss, the bigram table and padding on the left "
                "read them"
            )
        return torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)

    def _pads_left(self, padding_side: str | None) -> bool:
        if self.tokenizer is None:
            return False
        side = padding_side or getattr(self.tokenizer, "padding_side", "right")
        return bool(side == "left")

    def _mask_padding(self, tokens: Tokens, prepend_bos: bool | None) -> Tokens:
        """The attention mask of tokens that are padded on the left."""
        if prepend_bos is None:
            prepend_bos = self.cfg.default_prepend_bos
        mask: Tensor = get_attention_mask(self.tokenizer, tokens, prepend_bos, "left")
        return mask

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Every move and cast calls this method. TransformerLens itself does not update its
        # configuration after all of them, for example not after `.double()`.
        super()._apply(fn, recurse)
        for name, value in tensor_config_fields(self.network).items():
            setattr(self.cfg, name, value)
        return self

    @classmethod
    def _refuse_processing(cls, *args: Any, **kwargs: Any) -> Any:
        """Raise `UnsupportedError`: the weights of this model cannot be folded or centered."""
        raise UnsupportedError(
            "the weights of this model must stay as they are: the entries that AbsTopK keeps "
            "depend on the scale of every channel, so norm weights and biases cannot be folded "
            "into other weights, and weights cannot be centered. Analyse the model as loaded: "
            "hooks show each activation before and after the weight of its norm"
        )

    process_weights = process_weights_ = fold_layer_norm = fold_value_biases = _refuse_processing
    center_writing_weights = center_unembed = refactor_factored_attn_matrices = _refuse_processing
    load_and_process_state_dict = _refuse_processing

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*token d_model"]:
        """The directions in the normalized residual stream that give the logits of `tokens`.

        These are the columns of W_U times the weight of ln_final, which other models fold into W_U.
        The rest of the logits is b_U, W_U · ln_final.b and the row of the bigram table, which
        bypasses the residual stream.
        """
        if self.sparse_cfg.bigram_table:
            warnings.warn(
                "a part of this model's logits comes from its bigram table (hook_bigram), which "
                "bypasses the residual stream: attributions of logits to the stream leave that "
                "part out",
                stacklevel=3,
            )
        directions: Tensor = super().tokens_to_residual_directions(tokens)  # type: ignore[misc]
        return directions * self.network.ln_final.w

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' method, with a `SparseActivationCache`."""
        out, cache = super().run_with_cache(*args, **kwargs)  # type: ignore[misc]
        if isinstance(cache, ActivationCache):
            cache = SparseActivationCache(cache.cache_dict, self, cache.has_batch_dim)
        return out, cache

    def warn_if_not_additive(self, what: str) -> None:
        """If the residual stream is not a sum of components, warn that `what` assumes it is.

        Args:
            what: the name of the method or flag that adds or subtracts components.
        """
        cfg = self.sparse_cfg
        steps = [f"AbsTopK at {location}" for location in cfg.abs_topk if "resid" in location]
        if cfg.resid_relu:
            steps.insert(0, "a ReLU")
        if steps:
            warnings.warn(
                f"{what}: the residual stream of this model is not a sum of its components (it "
                f"passes {', '.join(steps)}), so tools that add and subtract components are not "
                "exact on it; patch whole activations (resid_pre, resid_mid, resid_post, attn_out, "
                "mlp_out) instead",
                stacklevel=3,
            )

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """TransformerLens' flag for `attn.hook_result`."""
        if use_attn_result:
            self.warn_if_not_additive("use_attn_result")
        super().set_use_attn_result(use_attn_result)  # type: ignore[misc]

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """TransformerLens' flag for `hook_q_input`, `hook_k_input` and `hook_v_input`."""
        if use_split_qkv_input:
            self.warn_if_not_additive("use_split_qkv_input")
            if "attn_out" in self.sparse_cfg.abs_topk and not self.cfg.use_attn_result:
                warnings.warn(
                    "use_split_qkv_input: AbsTopK acts on what attention writes, so what a head "
                    "writes is attn.hook_result (set_use_attn_result), not z @ W_O; direct path "
                    "patching, which takes the latter, also patches what AbsTopK drops",
                    stacklevel=2,
                )
        super().set_use_split_qkv_input(use_split_qkv_input)  # type: ignore[misc]

    def __repr__(self) -> str:
        cfg = self.sparse_cfg
        n_nonzero = 0
        n_parameters = 0
        for _, weight in self.network.weights():
            if not weight.is_meta:
                n_nonzero += int(weight.count_nonzero())
                n_parameters += weight.numel()
        return (
            f"{type(self).__name__}({cfg.n_layers} layers, d_model {cfg.d_model}, "
            f"{cfg.n_heads} heads of {cfg.d_head}, d_mlp {cfg.d_mlp}, vocabulary {cfg.d_vocab}, "
            f"context {cfg.n_ctx}; {n_nonzero:,} of {n_parameters:,} parameters nonzero)"
        )

    __str__ = __repr__


def _is_text(input: object) -> bool:
    """Whether an input is a text or a list of texts."""
    if isinstance(input, str):
        return True
    if not isinstance(input, Sequence) or not input:
        return False
    return all(isinstance(text, str) for text in input)


def _check_padding_side(side: str | None) -> None:
    if side not in (None, "left", "right"):
        raise DataError(f"padding_side = {side!r} is not possible; use 'left', 'right' or None")


def _check_layer(name: str, layer: int | None, n_layers: int) -> None:
    """Check the number of a block; as in Python's slices, negative ones count from the end."""
    if layer is None:
        return
    is_integer = isinstance(layer, int | np.integer) and not isinstance(layer, bool)
    if not is_integer or not -n_layers <= layer <= n_layers:
        raise DataError(
            f"{name} = {layer!r} is not possible; it must be an integer in "
            f"[{-n_layers}, {n_layers}], or None"
        )


def _check_return_type(return_type: str | None) -> None:
    if return_type not in (None, "logits", "loss", "both"):
        raise DataError(
            f"return_type = {return_type!r} is not possible; use 'logits', 'loss', 'both' or None"
        )


def _input_resid(input: object) -> Stream:
    """The input of a run with `start_at_layer`: a residual stream, with a batch dimension."""
    if not isinstance(input, Tensor) or not input.is_floating_point():
        raise DataError("start_at_layer needs the residual stream [batch, pos, d_model] as input")
    return input if input.ndim == 3 else input[None]
