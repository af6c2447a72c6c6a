"""SAELens, on TransformerLens 3: a small SAE is trained on a hook, saved and spliced in."""

import pytest
import torch
from tool_models import requires, sparse_model

from helpers import random_tokens

requires("sae_lens", line=3)

from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
)

from tl_sparse.faces.hooked import SparseHookedTransformer

HOOKS = [
    "blocks.0.hook_resid_post",
    "blocks.0.attn.hook_z",
    "blocks.1.mlp.hook_post",
    "blocks.1.ln2.hook_read",
]


class SparseHookedSAETransformer(HookedSAETransformer, SparseHookedTransformer):
    """All that `run_with_saes` takes on our model: `SparseHookedSAETransformer(model.network,
    model.tokenizer)`.

    It takes the model's place: SAELens puts modules of its own where the network's hook points
    were.
    """


def train(hook, tmp_path):
    """A model, tokens, and the SAE of 80 steps of SAELens' training, loaded from its folder."""
    model = sparse_model(dtype=torch.float32)
    tokens = random_tokens(model, batch=200, seed=5)
    width = model.run_with_cache(tokens[:1])[1][hook].shape[2:].numel()
    config = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(
            d_in=width,
            d_sae=3 * width,
            l1_coefficient=0.02,
            reshape_activations="hook_z" if hook.endswith("hook_z") else "none",
        ),
        model_name="tl_sparse",
        hook_name=hook,
        dataset_path="none",
        is_dataset_tokenized=True,
        streaming=False,
        prepend_bos=False,
        context_size=tokens.shape[1],
        training_tokens=80 * 64,
        train_batch_size_tokens=64,
        store_batch_size_prompts=8,
        n_batches_in_buffer=16,
        lr=0.01,
        lr_warm_up_steps=0,
        seed=0,
        device="cpu",
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        output_path=str(tmp_path / "sae"),
    )
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    with torch.random.fork_rng():
        torch.manual_seed(0)  # SAELens' own `seed` is not its first weights'
        LanguageModelSAETrainingRunner(config, override_model=model, override_dataset=dataset).run()
    return model, tokens, SAE.load_from_disk(str(tmp_path / "sae"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", HOOKS)
def test_an_sae_is_trained_and_spliced_in(hook, tmp_path):
    model, tokens, sae = train(hook, tmp_path)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        x = cache[hook]
        unexplained = (sae(x) - x).pow(2).sum() / (x - x.mean((0, 1))).pow(2).sum()
        assert unexplained < 0.1, "it learned from other activations than these"

        def replace(x, hook):
            return sae(x)

        by_hand = model.run_with_hooks(tokens, fwd_hooks=[(hook, replace)])

        most_active = int(sae.encode(x).mean((0, 1)).argmax())

        def without_it(x, hook):
            latents = sae.encode(x)
            latents[..., most_active] = 0
            return sae.decode(latents)

        ablated_by_hand = model.run_with_hooks(tokens, fwd_hooks=[(hook, without_it)])
        assert (by_hand - logits).abs().max() > 1e-2
        assert (ablated_by_hand - by_hand).abs().max() > 1e-3

        spliced = SparseHookedSAETransformer(model.network, model.tokenizer).eval()
        torch.testing.assert_close(spliced(tokens), logits, atol=1e-6, rtol=0)
        torch.testing.assert_close(
            spliced.run_with_saes(tokens, saes=[sae]), by_hand, atol=1e-5, rtol=0
        )
        with_error = spliced.run_with_saes(tokens, saes=[sae], use_error_term=True)
        torch.testing.assert_close(with_error, logits, atol=1e-5, rtol=0)

        def drop_it(latents, hook):
            latents[..., most_active] = 0
            return latents

        ablated = spliced.run_with_hooks_with_saes(
            tokens, saes=[sae], fwd_hooks=[(f"{hook}.hook_sae_acts_post", drop_it)]
        )
        torch.testing.assert_close(ablated, ablated_by_hand, atol=1e-5, rtol=0)

        _, sae_cache = spliced.run_with_cache_with_saes(tokens, saes=[sae])
        torch.testing.assert_close(
            sae_cache[f"{hook}.hook_sae_acts_post"], sae.encode(x), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            spliced(tokens), logits, atol=1e-6, rtol=0
        )  # the SAE is gone again
