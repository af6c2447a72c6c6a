"""Weight-sparse training, one step at a time.

The update rule is that of Gao et al. 2025 (arXiv 2511.13653), sections 2.1 and A.2, and of the
authors' published training script. Where the two differ, the configuration selects one of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.errors import CheckpointError, TrainError
from tl_sparse.hooks import TLModel, parts_of, shard_of, sharded_like
from tl_sparse.network import SparseConfig
from tl_sparse.precision import in_float32
from tl_sparse.training.config import TrainConfig
from tl_sparse.training.nonzero_steps import (
    RATIO,
    NonzeroSteps,
    check_positions,
    root_mean_square,
)
from tl_sparse.training.objective import Objective
from tl_sparse.training.processes import Processes
from tl_sparse.training.schedules import annealed_topks, weight_sparsity
from tl_sparse.training.sharding import WholeWeights
from tl_sparse.training.tokens import training_tokens


class Trainer:
    """The update rule, applied one step at a time.

    By default, a step divides the gradients by their root mean square, takes one Adam step without
    weight decay, keeps only the largest entries of every weight matrix, and then decays the
    matrices.

    Args:
        model: a model of this package, in float32 or float64. Parameters without `requires_grad`
            are left alone: they get no optimizer step, no top-k and no decay, and do not count
            towards the number of nonzero weights.
        config: the hyper-parameters; `config.steps` is the length of the schedules.
        processes: the processes that train together; None for this process alone.
        objective: what is minimised, and what is trained beside the model; None is the next-token
            loss of the model alone.

    Raises:
        ConfigError: if a pattern in `config.l0_groups` matches no weights.
        TrainError: if the model cannot be trained, because all its weight matrices are frozen, or
            because of the dtype of its parameters.
    """

    def __init__(
        self,
        model: TLModel,
        config: TrainConfig,
        processes: Processes | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.processes = processes or Processes()
        self.processes.shard(model)
        self.objective = objective or Objective()
        self.objective.start(model, config, next(model.parameters()).device)
        self.sparsity = weight_sparsity(model, config)
        self.matrices: list[Tensor] = []
        for group in self.sparsity.groups:
            self.matrices += group.parameters
        # While a sharded model runs, whole weights take the place of its parameters.
        self.parameters_by_name = dict(self._named_parameters())
        self.parameters = [p for p in self.parameters_by_name.values() if p.requires_grad]
        _check_trainable(self.parameters)
        self.optimizer = self._adam()
        self.nonzero_steps = NonzeroSteps(
            model, self.sparsity, self.optimizer, config.dense_gradient_steps, config.steps
        )
        self._annealed_topks = annealed_topks(model, config)

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the model, and of what is trained beside it."""
        yield from self.model.named_parameters()
        for name, parameter in self.objective.beside.named_parameters():
            yield f"{self.objective.name}.{name}", parameter

    def _weights(self) -> dict[str, Tensor]:
        """The state dict of the model, with that of what is trained beside it."""
        weights = dict(self.model.state_dict())
        for name, weight in self.objective.beside.state_dict().items():
            weights[f"{self.objective.name}.{name}"] = weight
        return weights

    def whole_weights(self) -> Mapping[str, Tensor]:
        """The state dict of the model.

        If the weights are sharded, all processes call this together: the main process then reads
        all of them, and for the others the mapping is empty once it has done so.
        """
        weights = self.model.state_dict()
        if not self.processes.sharded:
            return weights
        whole = WholeWeights(weights)
        if self.processes.main:
            return whole
        whole.take_part()
        return {}

    def _adam(self) -> torch.optim.Optimizer:
        """Adam over all parameters, or AdamW, which decays the matrices before the step."""
        config = self.config
        can_fuse = all(
            p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self.parameters
        )
        options: dict[str, Any] = {
            "lr": 0.0,  # set in every step
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
            "fused": can_fuse,
        }
        if config.decay == "after":
            return torch.optim.Adam(self.parameters, **options)
        matrix_ids = {id(p) for p in self.matrices}
        matrices = [p for p in self.parameters if id(p) in matrix_ids]
        others = [p for p in self.parameters if id(p) not in matrix_ids]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, **options)

    @property
    def steps_done(self) -> int:
        """The number of steps taken, which is also the number of the next step, from 0."""
        return self.sparsity.steps

    @property
    def n_weights(self) -> int:
        """The number of weights in all matrices that are trained, zeros too."""
        return sum(matrix.numel() for matrix in self.matrices)

    def lr(self, step: int) -> float:
        """The learning rate of step number `step`, from 0.

        It rises linearly during the warm-up, and then falls linearly to 0. Sharkfin also multiplies
        it by sqrt(final fraction / fraction at this step) of nonzero weights, which is the factor
        1/sqrt(L0) of section A.2.
        """
        config = self.config
        warmup = int(config.warmup_fraction * config.steps)
        if step < warmup:
            shape = step / warmup
        else:
            shape = 1 - (step - warmup) / (config.steps - warmup)
        if config.sharkfin:
            shape *= (config.matrix_fraction / self.sparsity.fraction_at(step)) ** 0.5
        return config.lr * shape

    def anneal_topks(self) -> None:
        """Set the k of each AbsTopK to that of the schedule after the steps taken so far."""
        for topk in self._annealed_topks:
            topk.set_k(self.steps_done)

    def architecture(self) -> SparseConfig:
        """The architecture of the model as it is now: with the present k of an annealed AbsTopK.

        Where k is not the model's yet, the fraction is (k + 1/2) / dim, which rounds down to k.
        """
        config: SparseConfig = self.model.sparse_cfg
        abs_topk = dict(config.abs_topk)
        for topk in self._annealed_topks:
            module = topk.module
            if module.k is not None and module.k != config.topk(module.location):
                abs_topk[module.location] = min(1.0, (module.k + 0.5) / module.dim)
        return replace(config, abs_topk=abs_topk)

    # A notebook may have switched gradients off, as `torch.set_grad_enabled(False)` does.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Take one step on a batch.

        Args:
            tokens: this process's part of the batch, in any integer dtype.

        Returns:
            The mean loss of the whole batch before the step: the next-token loss in nats, unless
            there is another objective. If it is not a finite number, the step is not taken.

        Raises:
            DataError: if the tokens are not integers `[batch, pos]` of the model's vocabulary, or
                there are none.
        """
        tokens = training_tokens(tokens)
        lr = self.lr(self.steps_done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.anneal_topks()
        self.nonzero_steps.begin()
        with self.nonzero_steps.in_products():
            loss = self._backward(tokens)
        self.nonzero_steps.take_gradients()
        trained = self.nonzero_steps.trained(self.parameters)
        loss = self.processes.average(loss, trained)  # the gradients are averaged too
        if not bool(loss.isfinite()):
            self.optimizer.zero_grad()
            return loss

        self._normalize_gradients()
        self.optimizer.step()
        self.nonzero_steps.project()
        self.sparsity.steps += 1
        self.optimizer.zero_grad()
        if self.config.decay == "after":
            self._decay_matrices(lr)
        self.nonzero_steps.write()
        return loss

    def _backward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Accumulate the gradients of the batch's mean loss, part by part, and return that loss."""
        total = torch.zeros((), device=tokens.device)
        for part in tokens.chunk(self.config.accumulation):
            share = len(part) / len(tokens)
            total += self.objective.backward(part, share, self.steps_done)
        return total

    @torch.no_grad()
    def _normalize_gradients(self) -> None:
        """Divide the gradients by their root mean square over all entries of all parameters, as in
        the published script, or clip that root mean square to 1, as in the paper's text.

        Between dense gradients the root mean square is estimated; see `NonzeroSteps.rms_of_all`.
        """
        config = self.config
        if config.model.bigram_table and not config.last_bigram_row:
            self._leave_last_bigram_row()
        trained = self.nonzero_steps.trained(self.parameters)
        gradients = [p.grad for p in trained if p.grad is not None]
        rms_of_known = root_mean_square(gradients, self.processes)
        rms = self.nonzero_steps.rms_of_all(rms_of_known, self.parameters)
        if config.gradient == "divide":
            divisor = rms + 1e-5  # the published script adds 1e-5
        else:
            divisor = rms.clamp(min=1)
        torch._foreach_mul_(parts_of(gradients), 1 / divisor)

    def _leave_last_bigram_row(self) -> None:
        """Set the gradient of the last row of the bigram table to zero.

        It is not left out, because its entries count in the mean.
        """
        table = self.parameters_by_name["bigram.W_bigram"]
        if table.grad is None:  # the table may be frozen
            return
        shard = shard_of(table.grad)
        if shard.first + len(shard.part) == len(table):
            shard.part[-1:] = 0

    @torch.no_grad()
    def _decay_matrices(self, lr: float) -> None:
        """Decay the matrices as the published script does, by w -= λ · lr · w.

        Multiplying by 1 - λ · lr instead would round differently. After 36 steps of the authors'
        trajectory, that changes whether a weight is in the top-k.
        """
        alpha = -self.config.weight_decay * lr
        matrices = parts_of(self.nonzero_steps.trained(self.matrices))
        torch._foreach_add_(matrices, matrices, alpha=alpha)

    def state(self) -> dict[str, Tensor]:
        """The tensors on which the next step depends, besides configuration, data and `steps_done`.

        Returns:
            The weights as "model/NAME", and Adam's state for each parameter as "exp_avg/NAME",
            "exp_avg_sq/NAME" and "step/NAME". After a step without a dense gradient, Adam's state
            of a weight is that of its nonzero entries, which are at "positions/NAME" in the
            flattened weight. The tensors are not copied.
        """
        state = self.nonzero_steps.state(self._names())
        for name, weight in self._weights().items():
            state[f"model/{name}"] = weight
        for name, parameter in self.parameters_by_name.items():
            [trained] = self.nonzero_steps.trained([parameter])
            moments = self.optimizer.state.get(trained, {})
            for kind, moment in moments.items():
                state[f"{kind}/{name}"] = moment
        return state

    def _names(self) -> dict[Tensor, str]:
        """The name of each weight that is made sparse."""
        ids = set(map(id, self.matrices))
        return {p: name for name, p in self.parameters_by_name.items() if id(p) in ids}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], steps_done: int) -> None:
        """Continue from the state that `state` returned after `steps_done` steps.

        Raises:
            CheckpointError: if `state` is not that of such a model and optimizer: an entry is
                missing, not known, or of another shape or dtype. Nothing has changed then.
        """
        self._check_state(state)
        for name, weight in self._weights().items():
            weight.copy_(sharded_like(state[f"model/{name}"], weight))
        self.nonzero_steps.load_state(state, self._names())
        for name, parameter in self.parameters_by_name.items():
            [trained] = self.nonzero_steps.trained([parameter])
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                if f"{kind}/{name}" in state:
                    moment = sharded_like(state[f"{kind}/{name}"], trained)
                    self.optimizer.state[trained][kind] = moment
        self.sparsity.steps = steps_done

    def empty_state(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors for `load_state`, without values, into which those of a checkpoint can be read.

        Args:
            stored: the tensors of the checkpoint, of which only shapes and dtypes are used.

        Raises:
            CheckpointError: as for `load_state`.
        """
        self._check_state(stored)
        expected = self._expected_state(stored)
        return {name: torch.empty_like(tensor) for name, tensor in expected.items()}

    def _expected_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes that `state` must have."""
        expected = {}
        for name, weight in self._weights().items():
            expected[f"model/{name}"] = weight
        names = self._names()
        for name, parameter in self.parameters_by_name.items():
            trained: Tensor = parameter
            positions = state.get(f"positions/{name}")
            if positions is not None and parameter in names:
                check_positions(name, positions, parameter)
                expected[f"positions/{name}"] = positions
                trained = parameter.new_empty(len(positions))
            if parameter.requires_grad and f"step/{name}" in state:
                expected[f"step/{name}"] = torch.zeros(())
                expected[f"exp_avg/{name}"] = trained
                expected[f"exp_avg_sq/{name}"] = trained
        if RATIO in state:
            expected[RATIO] = in_float32(torch.zeros((), dtype=parameter.dtype))
        return expected

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise `CheckpointError` unless `state` has the names, shapes and dtypes of this one."""
        expected = self._expected_state(state)
        differing = sorted(expected.keys() ^ state.keys())
        if differing:
            raise CheckpointError(f"{differing[0]} is missing or does not belong to this model")
        for name, tensor in expected.items():
            found = state[name]
            if found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{name} is {found.dtype} of shape {list(found.shape)}, "
                    f"not {tensor.dtype} of {list(tensor.shape)}"
                )


def _check_trainable(parameters: Sequence[Tensor]) -> None:
    """Raise `TrainError` if these parameters of a model cannot be trained."""
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise TrainError(
                f"parameters of {parameter.dtype} cannot be trained, since small steps would be "
                "lost in rounding; use model.float(), with precision = 'bfloat16' to multiply "
                "matrices in bfloat16"
            )
        if parameter.is_inference():
            raise TrainError(
                "a model that was made in torch.inference_mode() cannot be trained; make it outside"
            )
