"""Writers of the formats of others: OpenAI's own, its package for the hub, and sparse_pretrain's.

`cfg` is a configuration of ours, and `w` the state dict of a model of ours.
"""

import json

import torch
from safetensors.torch import save_file


def openai_values(cfg):
    """`beeg_config.json` for a configuration of ours."""
    return dict(
        block_size=cfg.n_ctx, vocab_size=cfg.d_vocab, n_layer=cfg.n_layers, n_head=cfg.n_heads,
        d_head=cfg.d_head, d_model=cfg.d_model, d_mlp=cfg.d_mlp, bias=cfg.biases,
        ln_bias=cfg.norm_bias, rms_norm=cfg.normalization == "rms",
        residual_activation_type="relu" if cfg.resid_relu else "identity",
        activation_type=cfg.act_fn, afrac=next(iter(cfg.abs_topk.values()), None),
        afrac_loctypes=",".join(cfg.abs_topk), tied_unembed=cfg.tied_unembed,
        tokenizer_name="tinypython_2k", enable_bigram_table=cfg.bigram_table,
        learnable_bigram_table=True, d_pos_emb=cfg.d_pos or None,
        sinusoidal_cat_pos_emb=cfg.sinusoidal, dropout_cat_pos_emb=False, sink=cfg.attn_sinks,
        flash=True, grad_checkpointing=False, dropout=0.0, debug_nans=False,
        enable_sparse_kernels=False, pfrac=0.3,
    )  # fmt: skip


def openai_tensors(cfg, w):
    """`final_model.pt` for a state dict of ours."""
    tensors = {
        "transformer.wte.weight": w["embed.W_E"],
        "transformer.wpe.weight": w.get("pos_embed.W_pos", torch.zeros(cfg.n_ctx, cfg.d_model)),
        "lm_head.weight": w["embed.W_E"] if cfg.tied_unembed else w["unembed.W_U"].T,
        "final_logits_bias": w.get("unembed.b_U"),
        "bigram_table": w.get("bigram.W_bigram"),
        "transformer.ln_f.weight": w["ln_final.w"],
        "transformer.ln_f.bias": w.get("ln_final.b"),
    }
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        theirs = {
            **openai_norm(w, f"{block}.ln1", "1"),
            **openai_norm(w, f"{block}.ln2", "2"),
            **openai_attention(w, f"{block}.attn"),
            **openai_mlp(w, f"{block}.mlp"),
        }
        for name, tensor in theirs.items():
            tensors[f"transformer.h.{layer}.{name}"] = tensor
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def openai_norm(w, name, number):
    return {
        f"ln_{number}.weight": w[f"{name}.w"],
        f"ln_{number}.bias": w.get(f"{name}.b"),
        f"ln_p{number}.weight": w.get(f"{name}.w_pos"),
        f"ln_p{number}.bias": w.get(f"{name}.b_pos"),
    }


def openai_attention(w, name):
    rows = []
    biases = []
    for letter in "QKV":
        by_head = with_positions(w, f"{name}.W_{letter}", 1)
        rows += [matrix.T for matrix in by_head]
        if f"{name}.b_{letter}" in w:
            biases.append(w[f"{name}.b_{letter}"].flatten())
    return {
        "attn.c_attn.weight": torch.cat(rows),
        "attn.c_attn.bias": torch.cat(biases) if biases else None,
        "attn.c_proj.weight": torch.cat(list(w[f"{name}.W_O"])).T,
        "attn.c_proj.bias": w.get(f"{name}.b_O"),
        "attn.attn_imp.sink_logit": w.get(f"{name}.sink"),
    }


def openai_mlp(w, name):
    return {
        "mlp.c_fc.weight": with_positions(w, f"{name}.W_in", 0).T,
        "mlp.c_fc.bias": w.get(f"{name}.b_in"),
        "mlp.c_proj.weight": w[f"{name}.W_out"].T,
        "mlp.c_proj.bias": w.get(f"{name}.b_out"),
    }


def with_positions(w, name, dim):
    """A weight with its rows of positional channels, if it has any."""
    if f"{name}_pos" not in w:
        return w[name]
    return torch.cat([w[name], w[f"{name}_pos"]], dim)


def contiguous(tensors):
    """As safetensors wants them: in order, and no two in one memory."""
    return {name: x.contiguous().clone() for name, x in tensors.items()}


def write_openai(folder, model, drop=(), **changes):
    """`model` as a folder of OpenAI's; `changes` to its configuration, without the keys `drop`."""
    values = openai_values(model.sparse_cfg) | changes
    for key in drop:
        del values[key]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "beeg_config.json").write_text(json.dumps(values))
    torch.save(openai_tensors(model.sparse_cfg, model.state_dict()), folder / "final_model.pt")
    return folder


def circuitgpt_values(cfg):
    """The config.json of a model that OpenAI packaged for the hub."""
    values = openai_values(cfg)
    return values | dict(
        model_type="circuitgpt", architectures=["CircuitGPTForCausalLM"], torch_dtype="float32",
        use_cache=False,
        auto_map={"AutoModelForCausalLM": "modeling_circuitgpt.CircuitGPTForCausalLM"},
        is_decoder=True, transformers_version="4.57.0", bos_token_id=None, eos_token_id=2047,
        max_position_embeddings=values["block_size"], num_hidden_layers=values["n_layer"],
        tie_word_embeddings=values["tied_unembed"], unembed_rank=None, bigram_table_rank=None,
        afrac_ste=False, afrac_ste_only_non_neurons=False, afrac_approx=False, rtopk=False,
        mup=False, mup_width_multiplier=None, enable_fp8_linear=False, scale_invariance=False,
    )  # fmt: skip


def circuitgpt_tensors(cfg, w):
    """Its model.safetensors."""
    tensors = {f"circuit_model.{name}": x for name, x in openai_tensors(cfg, w).items()}
    return contiguous(tensors)


def write_circuitgpt(folder, model, drop=(), **changes):
    """`model` as OpenAI packaged theirs, without the tensors `drop`; `changes` to config.json."""
    cfg = model.sparse_cfg
    weights = circuitgpt_tensors(cfg, model.state_dict())
    for name in drop:
        del weights[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(circuitgpt_values(cfg) | changes))
    save_file(weights, folder / "model.safetensors")
    return folder


def sparse_pretrain_values(cfg):
    """The config.json of sparse_pretrain's for a configuration of ours."""
    model_config = dict(
        n_layer=cfg.n_layers, d_model=cfg.d_model, n_ctx=cfg.n_ctx, d_head=cfg.d_head,
        d_mlp=cfg.d_mlp, vocab_size=cfg.d_vocab, use_rms_norm=cfg.normalization == "rms",
        tie_embeddings=cfg.tied_unembed, use_positional_embeddings=cfg.positions == "added",
        use_bigram_table=cfg.bigram_table, use_attention_sinks=cfg.attn_sinks,
        activation=cfg.act_fn, dropout=0.0, use_bias=cfg.biases,
    )  # fmt: skip
    names = {"resid_post_attn": "resid_mid"}
    sparsity_config = dict(
        enable_weight_sparsity=True, target_l0_fraction=0.1,
        enable_activation_sparsity=bool(cfg.abs_topk),
        activation_topk_fraction=next(iter(cfg.abs_topk.values()), 0.25),
        activation_sparsity_locations=",".join(names.get(name, name) for name in cfg.abs_topk),
    )  # fmt: skip
    return dict(
        model_config=model_config,
        sparsity_config=sparsity_config,
        training_config={"batch_size": 2},
    )


def sparse_pretrain_tensors(cfg, w):
    """Its pytorch_model.bin."""
    theirs = {}
    for name, tensor in openai_tensors(cfg, w).items():
        name = name.replace("transformer.h.", "blocks.").removeprefix("transformer.")
        if name != "wpe.weight" or cfg.positions == "added":
            theirs[name.replace("attn_imp", "attn_fn")] = tensor
    return theirs


def write_sparse_pretrain(
    folder, model, drop=(), sparsity=(), safetensors=False, extra=(), **changes
):
    """`model` as a folder of sparse_pretrain's.

    Its model_config has `changes` and lacks the keys `drop`; its sparsity_config has the values
    `sparsity`; and there are `extra` tensors.
    """
    values = sparse_pretrain_values(model.sparse_cfg)
    values["model_config"] |= changes
    values["sparsity_config"] |= dict(sparsity)
    for key in drop:
        del values["model_config"][key]
    weights = sparse_pretrain_tensors(model.sparse_cfg, model.state_dict()) | dict(extra)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if safetensors:
        save_file(contiguous(weights), folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder
