"""What both faces of the network share: `SparseModel`, and the choice of the face for the installed
line.

`hooked.py` (TransformerLens 3) and `bridge.py` (TransformerLens 4) add only what differs.
"""

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.utilities.tokenize_utils import get_attention_mask
from transformers import PreTrainedTokenizerBase

from tl_sparse.data import END_OF_TEXT
from tl_sparse.errors import DataError, TokenizerError, UnsupportedError
from tl_sparse.faces.cache import SparseActivationCache
from tl_sparse.files import write_json
from tl_sparse.network import SparseConfig, SparseTransformer, Stream, Tokens
from tl_sparse.tasks import Score, tasks_table

#: TransformerLens' options to change weights when a model is loaded.
_PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


class SparseModel(nn.Module):
    """Mixed into TransformerLens' own model class by both faces, before it.

    The face holds the network's modules as its own children, so hook names, parameter names and
    `state_dict` keys are the network's on both lines.
    """

    network: SparseTransformer
    embed: Any
    tokenizer: Any
    cfg: Any
    W_U: Any
    loss_fn: Any

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # The network runs; tools such as SAELens put modules of their own in the place of the
        # face's.
        if isinstance(value, nn.Module) and name in self.__dict__.get("_network_children", ()):
            setattr(self.network, name, value)

    def adopt_network(self, flags: Any) -> None:
        """Make the network's modules this model's own, under their names, and let `flags` act in
        them.
        """
        self.network.follow(flags)
        for name, child in self.network.named_children():
            setattr(self, name, child)
        self.__dict__["_network_children"] = {name for name, _ in self.network.named_children()}

    @classmethod
    def from_pretrained(cls, source: str | Path, *args: Any, **kwargs: Any) -> Any:
        """The same call as `tl_sparse.load`; `UnsupportedError` if an option to process weights is
        on.
        """
        if any(kwargs.pop(name, False) for name in _PROCESSING):
            cls._refuse_processing()
        from tl_sparse.checkpoints import (
            load,
        )  # above this room: a marked exception, see tests/test_rooms.py

        return load(source, *args, **kwargs)

    from_pretrained_no_processing = from_pretrained

    def set_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, default_padding_side: str | None = None
    ) -> None:
        """Give the model a tokenizer, checked and completed as `prepare_tokenizer` says."""
        self.tokenizer, self.cfg.tokenizer_prepends_bos = prepare_tokenizer(
            tokenizer, self.cfg.d_vocab
        )
        self.tokenizer.padding_side = default_padding_side or self.tokenizer.padding_side

    def to_tokens(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' method: text → tokens [batch, pos]; `TokenizerError` without a
        tokenizer.
        """
        if self.tokenizer is None:
            raise TokenizerError(
                "this model has no tokenizer, so it takes token ids only; set_tokenizer gives it one"
            )
        return super().to_tokens(input, *args, **kwargs)  # type: ignore[misc]

    @property
    def sparse_cfg(self) -> SparseConfig:
        """The architecture; `model.cfg` is TransformerLens' view of it."""
        return self.network.cfg

    def save_pretrained(self, folder: str | Path, dense: bool = False) -> None:
        """Write `config.json`, `model.safetensors` and, if there is one, the tokenizer; see
        `tl_sparse.load`.

        Zeros take no space in these files. Other readers of safetensors files understand those of
        `dense=True`.
        """
        from tl_sparse.checkpoints import save_model  # above this room, as in `from_pretrained`

        save_model(Path(folder), self.state_dict(), self.sparse_cfg, self.tokenizer, dense)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        record: Mapping[str, Any] | None = None,
        dense: bool = False,
        **options: Any,
    ) -> str:
        """Upload the model, as `save_pretrained` writes it, with a card; returns the repository's
        address.

        Args:
            repo_id: `"user/repo"`, made if it does not exist; the card in it is replaced.
            record: how the model was trained, for the card: what `train` returned and wrote to
                `training.json`.
            dense: as in `save_pretrained`.
            options: `private`, `revision`, `token` and `commit_message`; see
                `tl_sparse.checkpoints.push_folder`.

        Raises:
            CheckpointError: if the hub cannot be reached, or refuses.
        """
        from tl_sparse.checkpoints import push_folder  # above this room, as in `from_pretrained`

        def write(folder: Path) -> None:
            self.save_pretrained(folder, dense)
            if record is not None:
                write_json(folder / "training.json", record)

        return push_folder(repo_id, write, lambda name: self.card(name, record), **options)

    def card(self, repo_id: str, record: Mapping[str, Any] | None = None) -> str:
        """The README.md of the model's repository: what it is, how it was trained (`record`), and
        how to load it.
        """
        from tl_sparse.checkpoints import card_text  # above this room, as in `from_pretrained`

        return card_text(
            repo_id,
            what="A weight-sparse transformer",
            facts=_model_facts(self, record or {}),
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
        """`HookedTransformer.forward`'s contract on both lines.

        Args:
            input: text, tokens, or with `start_at_layer` the residual stream that enters this
                block.
            return_type: "logits", "loss", "both" or None.
            loss_per_token: the next-token loss of each position instead of the mean.
            prepend_bos, padding_side: how text becomes tokens; None: TransformerLens' defaults.
            tokens: with `start_at_layer`, those behind the residual stream; the loss and a bigram
                table need them.
            attention_mask: 1 for real tokens; computed where the padding is on the left.
            position_ids: default 0, 1, …
            stop_at_layer: return the residual stream that enters this block.

        Raises:
            DataError: for a sequence longer than the context, a missing `tokens`, or an input of
                another kind.
            TokenizerError: for text without a tokenizer.
        """
        if return_type not in (None, "logits", "loss", "both"):
            raise DataError(
                f"return_type = {return_type!r} is not possible; use 'logits', 'loss', 'both' or None"
            )
        resid: Tensor | None = None
        side = padding_side or getattr(self.tokenizer, "padding_side", "right")
        padded = attention_mask is None and side == "left" and self.tokenizer is not None
        if start_at_layer is not None:
            if not isinstance(input, Tensor) or not input.is_floating_point():
                raise DataError(
                    "start_at_layer needs the residual stream [batch, pos, d_model] as input"
                )
            resid = input if input.ndim == 3 else input[None]
            needed = stop_at_layer is None and (
                self.sparse_cfg.bigram_table or return_type in ("loss", "both")
            )
            if tokens is None and (needed or padded):
                reason = "the loss, the bigram table and padding on the left read them"
                raise DataError(f"start_at_layer needs tokens=…: {reason}")
            tokens = torch.zeros(resid.shape[:2], dtype=torch.long) if tokens is None else tokens
        elif isinstance(input, Tensor):
            tokens = input if input.ndim == 2 else input[None]
        elif isinstance(input, str) or (input and all(isinstance(text, str) for text in input)):
            tokens = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
        else:
            raise DataError(
                f"the input must be text, a list of texts, or token ids, not {type(input).__name__}"
            )
        if padded:
            bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
            attention_mask = get_attention_mask(self.tokenizer, tokens, bos, side)
        self.network.check_input(tokens, resid, attention_mask, position_ids)
        out = self.network(
            tokens.to(self.network.embed.W_E.device),
            attention_mask,
            position_ids,
            resid=resid,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
        )
        if stop_at_layer is not None or return_type == "logits":
            return out
        if return_type is None:
            return None
        loss = self.loss_fn(out, tokens.to(out.device), attention_mask, loss_per_token)
        return loss if return_type == "loss" else (out, loss)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Every move and cast ends here, also `.double()`, which TransformerLens' configuration does
        # not follow.
        super()._apply(fn, recurse)
        for name, value in tensor_config_fields(self.network).items():
            setattr(self.cfg, name, value)
        return self

    @classmethod
    def _refuse_processing(cls, *args: Any, **kwargs: Any) -> Any:
        """Not possible on this model: its weights cannot be folded or centered."""
        raise UnsupportedError(
            "the weights of this model must stay as they are: AbsTopK and what it drops depend on the scale of "
            "every channel, so norm weights and biases cannot be folded into other weights, nor weights be "
            "centered. Analyse it as loaded: the hooks show each value before and after its norm's weight"
        )

    process_weights = process_weights_ = fold_layer_norm = fold_value_biases = _refuse_processing
    center_writing_weights = center_unembed = refactor_factored_attn_matrices = _refuse_processing
    load_and_process_state_dict = _refuse_processing

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*token d_model"]:
        """The directions of the normalised stream whose products with it are the tokens' logits.

        That is W_U times the weight of ln_final, which other models have folded into W_U. The
        logits beyond these products: b_U, W_U · ln_final.b, and the bigram table's share, which is
            off the residual stream.
        """
        if self.sparse_cfg.bigram_table:
            warnings.warn(
                "a part of this model's logits comes from its bigram table (hook_bigram), off the residual stream: "
                "attributions of logits to the stream leave that part out",
                stacklevel=3,
            )
        directions: Tensor = super().tokens_to_residual_directions(tokens)  # type: ignore[misc]
        return directions * self.network.ln_final.w

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' method; its cache knows what AbsTopK drops of what heads and neurons
        write.
        """
        out, cache = super().run_with_cache(*args, **kwargs)  # type: ignore[misc]
        if isinstance(cache, ActivationCache):
            cache = SparseActivationCache(cache.cache_dict, self, cache.has_batch_dim)
        return out, cache

    def warn_if_not_additive(self, what: str) -> None:
        """Warn that `what` adds and subtracts components, if on this model the residual stream is
        not their sum.
        """
        cfg = self.sparse_cfg
        nonlinear = ["a ReLU"] * cfg.resid_relu + [
            f"AbsTopK at {name}" for name in cfg.abs_topk if "resid" in name
        ]
        if nonlinear:
            warnings.warn(
                f"{what}: the residual stream of this model is not a sum of its components (it passes "
                f"{', '.join(nonlinear)}), so tools that add and subtract components are not exact on it; patch whole "
                "activations (resid_pre, resid_mid, resid_post, attn_out, mlp_out) instead",
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
        if (
            use_split_qkv_input
            and "attn_out" in self.sparse_cfg.abs_topk
            and not self.cfg.use_attn_result
        ):
            warnings.warn(
                "use_split_qkv_input: AbsTopK acts on what attention writes, so what a head writes is attn.hook_result "
                "(set_use_attn_result), not z @ W_O; direct path patching, which takes the latter, also patches what "
                "AbsTopK drops",
                stacklevel=2,
            )
        super().set_use_split_qkv_input(use_split_qkv_input)  # type: ignore[misc]

    def __repr__(self) -> str:
        counts = [
            (int(w.count_nonzero()), w.numel()) for _, w in self.network.weights() if not w.is_meta
        ]
        cfg, kept, total = (
            self.sparse_cfg,
            sum(kept for kept, _ in counts),
            sum(total for _, total in counts),
        )
        return (
            f"{type(self).__name__}({cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_heads} heads of "
            f"{cfg.d_head}, d_mlp {cfg.d_mlp}, vocabulary {cfg.d_vocab}, context {cfg.n_ctx}; "
            f"{kept:,} of {total:,} parameters nonzero)"
        )

    __str__ = __repr__


def _model_facts(model: SparseModel, record: Mapping[str, Any]) -> str:
    topk = ", ".join(
        f"{where} {fraction:g}" for where, fraction in model.sparse_cfg.abs_topk.items()
    )
    keys = "command", "data", "training_tokens_seen", "training_loss", "validation_loss", "config"
    training = json.dumps(
        {key: record[key] for key in keys if key in record}, indent=2, ensure_ascii=False
    )
    facts = f"{model!r}\nAbsTopK, fraction kept: {topk or 'none'}" + (
        f"\ntraining: {training}" if record else ""
    )
    if "tasks" in record:
        scores = {name: values and Score(**values) for name, values in record["tasks"].items()}
        facts += f"\n\nTasks, a choice between two next tokens (a coin has loss 0.693):\n{tasks_table(scores)}"
    return facts


def tensor_config_fields(network: SparseTransformer) -> dict[str, Any]:
    """The fields of TransformerLens' configuration classes that depend on where and what the
    weights are.
    """
    weight = network.embed.W_E
    eps = float(torch.finfo(weight.dtype).eps) if network.cfg.normalization == "rms" else 1e-5
    return dict(dtype=weight.dtype, device=str(weight.device), eps=eps)


def tl_config_fields(network: SparseTransformer) -> dict[str, Any]:
    """The fields of TransformerLens' configuration classes that describe the network on both
    lines.
    """
    cfg = network.cfg
    return dict(
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        d_vocab_out=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        act_fn=cfg.act_fn,
        normalization_type="RMS" if cfg.normalization == "rms" else "LN",
        positional_embedding_type="standard" if cfg.positions == "added" else "none",
        model_name="tl_sparse",
        init_weights=False,
        **tensor_config_fields(network),
    )


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, d_vocab: int
) -> tuple[PreTrainedTokenizerBase, bool]:
    """A tokenizer checked and completed, as a copy; also whether it puts the begin-of-text token in
    front itself.

    Missing special tokens become its end-of-text token. TransformerLens' own set-up reloads the
    tokenizer from the place it came from, which fails for one that was made in memory; the rest of
    it is these lines.

    Raises:
        TokenizerError: if the vocabulary is larger than the model's, or it has no end-of-text
            token.
    """
    if not hasattr(tokenizer, "add_special_tokens") or not hasattr(tokenizer, "all_special_tokens"):
        raise TokenizerError(
            f"a tokenizer of transformers is needed, not {type(tokenizer).__name__}"
        )
    if (size := len(tokenizer)) > d_vocab:
        raise TokenizerError(
            f"the tokenizer has {size} tokens, the model d_vocab = {d_vocab}: not its tokenizer"
        )
    tokenizer = copy.deepcopy(tokenizer)
    known = [tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, END_OF_TEXT]
    end = next(
        (token for token in known if token is not None and token in tokenizer.get_vocab()), None
    )
    if end is None:
        raise TokenizerError(
            f"the tokenizer has no end-of-text token: neither eos_token nor {END_OF_TEXT!r} in its vocabulary; "
            "tokenizer.add_special_tokens({'eos_token': …}) names it"
        )
    roles = ("eos_token", "pad_token", "bos_token")
    tokenizer.add_special_tokens({role: end for role in roles if getattr(tokenizer, role) is None})
    ids = tokenizer.encode("a")
    return tokenizer, len(ids) > 1 and ids[0] == tokenizer.bos_token_id
