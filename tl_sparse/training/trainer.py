"""Weight-sparse training (Gao et al. 2025, sections 2.1, A.2; the authors' published update
rule).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.hooks import TLModel, WeightSparsity, annealed, weight_groups
from tl_sparse.network import AbsTopK
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.processes import Processes


class Trainer:
    """The update rule, a step at a time (METHOD §3): gradients divided by their RMS, one Adam step
    without decay, the top-k of every weight matrix, then decay of the matrices; or the variants
    that the configuration has of these.

    Args:
        model: a model of ours; its parameters without `requires_grad` stay as they are.
        config: the hyper-parameters; `config.steps` is the length of the schedules.
        processes: those that train together; None: this one alone.

    Raises:
        ConfigError: for a pattern in `config.l0_groups` that fits no weights.
    """

    def __init__(
        self, model: TLModel, config: TrainConfig, processes: Processes | None = None
    ) -> None:
        self.model, self.config, self.processes = model, config, processes or Processes()
        self.forward = torch.compile(model) if config.compile else model
        window = config.anneal_start * config.steps, config.anneal_stop * config.steps
        fractions = {
            "": config.matrix_fraction,
            "embed": config.l0_fraction_embed or config.matrix_fraction,
        }
        fractions |= config.l0_groups
        schedules = {
            name: annealed(target, *window, config.anneal_shape)
            for name, target in fractions.items()
        }
        self.sparsity = WeightSparsity(
            model,
            schedules.pop(""),
            embed_fraction=schedules.pop("embed"),
            group_fractions=schedules,
            min_nonzero=config.min_nonzero,
            groups=weight_groups(model, fused_qkv=config.fused_qkv, biases=config.sparse_biases),
        )
        self.matrices = [p for group in self.sparsity.groups for p in group.parameters]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self._optimizer()
        topk = config.topk_anneal_start * config.steps, config.topk_anneal_stop * config.steps
        self._abs_topk = [
            (module, module.k, annealed(module.k / module.dim, *topk))
            for module in model.network.modules()
            if isinstance(module, AbsTopK) and module.k is not None
        ]

    def _optimizer(self) -> torch.optim.Optimizer:
        config, ours = self.config, {id(p) for p in self.matrices}
        fused = all(
            p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self.parameters
        )
        options: dict[str, Any] = dict(
            lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused
        )
        if config.decay == "after":
            return torch.optim.Adam(self.parameters, **options)
        matrices = {
            "params": [p for p in self.parameters if id(p) in ours],
            "weight_decay": config.weight_decay,
        }
        others = {"params": [p for p in self.parameters if id(p) not in ours], "weight_decay": 0.0}
        return torch.optim.AdamW([matrices, others], **options)

    def lr(self, step: int) -> float:
        """lr · (warm-up, then linear decay to 0) · with sharkfin, sqrt(final fraction / fraction at
        this step).
        """
        config, warmup = self.config, int(self.config.warmup_fraction * self.config.steps)
        shape = step / warmup if step < warmup else 1 - (step - warmup) / (config.steps - warmup)
        if config.sharkfin:
            shape *= (config.matrix_fraction / self.sparsity.fraction_at(step)) ** 0.5
        return config.lr * shape

    def step(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """One optimizer step on a batch, of which `tokens` are this process's part; returns its
        mean next-token loss. If that is no number, nothing changes."""
        lr = self.lr(self.sparsity.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for module, k, schedule in self._abs_topk:
            module.k = max(k, int(schedule(self.sparsity.steps) * module.dim))
        loss = self.processes.average(self._backward(tokens), self.parameters)
        if not bool(loss.isfinite()):
            self.optimizer.zero_grad()
            return loss
        self._normalize_gradients()
        with self.sparsity.attached(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.config.decay == "after":
            # As published, w -= λ·lr·w. To multiply by 1 - λ·lr rounds otherwise: after 36 steps of
            # the authors' trajectory that decides a weight's place in the top-k differently.
            with torch.no_grad():
                torch._foreach_add_(
                    self.matrices, self.matrices, alpha=-self.config.weight_decay * lr
                )
        return loss

    def _backward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Gradients of the batch's mean loss, which is returned; part by part with
        `accumulation`.
        """
        total = torch.zeros((), device=tokens.device)
        low = self.config.precision == "bfloat16"
        for part in tokens.chunk(self.config.accumulation):
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=low):
                logits = self.forward(part)
            loss = next_token_loss(logits.float(), part) * (len(part) / len(tokens))
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def _normalize_gradients(self) -> None:
        """Divide by the root mean square over all entries of all parameters (published script), or
        clip that to 1.
        """
        if not self.config.last_bigram_row and self.config.model.bigram_table:
            self.model.network.bigram.W_bigram.grad[-1] = 0  # it counts in the mean
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        rms = (squares / sum(g.numel() for g in gradients)).sqrt()
        torch._foreach_mul_(
            gradients, 1 / (rms + 1e-5 if self.config.gradient == "divide" else rms.clamp(min=1))
        )


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """The mean of what `return_type="loss"` gives, without its copies of the logits."""
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)  # nothing follows the last token
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
