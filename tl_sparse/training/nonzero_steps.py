"""Steps that train only the nonzero weights: sparse-to-sparse training.

Between two steps with dense gradients, the zeros of sparse weights stay zeros. Their gradients are
not computed, and they have no moments and no updates.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.errors import CheckpointError
from tl_sparse.hooks import TLModel, WeightSparsity, parts_of
from tl_sparse.kernels import kernel
from tl_sparse.network import NonzeroMatrix, Nonzeros, Product
from tl_sparse.precision import in_float32
from tl_sparse.training.config import NONZEROS_BELOW
from tl_sparse.training.processes import Processes

#: The name in a checkpoint of the quotient of two root mean squares; see `NonzeroSteps.rms_of_all`.
RATIO = "gradients/rms_ratio"


class NonzeroSteps:
    """Decides which steps train only the nonzero weights, and puts these in the weights' place.

    Until the nonzero fractions have reached their final values, all steps have dense gradients:
    which weights stay is decided in them, and steps without dense gradients cost more of the loss
    there than they save of the time. After that, every `interval`-th step has dense gradients, and
    so has the last one. In the other steps, the weights of a group whose nonzero fraction is below
    `NONZEROS_BELOW` are held: the optimizer has the vector of their nonzero entries instead of the
    weight. All other parameters are trained as in every step.

    A weight that is held keeps the moments of its nonzero entries. When it is next released, for a
    dense gradient, the moments of the other entries begin at zero.

    Only on a CPU with numba does this save the time of the gradients, which are then products
    sampled at the nonzero weights. Elsewhere, and where the weight is used in another way than by a
    product, the dense gradient is computed and its other entries are dropped; this saves only the
    time of Adam, of the weight top-k and of the exchange between processes.

    Args:
        model: the model.
        sparsity: the groups of weights, and their fractions at each step.
        optimizer: the optimizer of all parameters; its parameters change in place.
        interval: the number of steps from one dense gradient to the next; 1 for always.
        n_steps: the number of steps of the training.
    """

    def __init__(
        self,
        model: TLModel,
        sparsity: WeightSparsity,
        optimizer: torch.optim.Optimizer,
        interval: int,
        n_steps: int,
    ) -> None:
        self.model = model
        self.sparsity = sparsity
        self.optimizer = optimizer
        self.interval = interval
        self.n_steps = n_steps
        self.held: dict[Tensor, Nonzeros] = {}
        self.matrices: dict[Product, NonzeroMatrix] = {}
        #: The root mean square of all gradients divided by that of the gradients of nonzero weights
        #: and dense parameters, in the last dense step that held no weight; None before one.
        self.rms_ratio: Float[Tensor, ""] | None = None

    def has_dense_gradient(self, step: int) -> bool:
        """Whether all entries of all weights have gradients in a step, counted from 0."""
        return step % self.interval == 0 or step == self.n_steps - 1

    def _low_weights(self) -> list[Tensor]:
        """The weights of the groups that had their final few nonzero entries already at the last
        multiple of the interval.
        """
        if self.interval == 1:
            return []
        step = self.sparsity.steps
        last_dense = step - step % self.interval
        weights = []
        for group in self.sparsity.groups:
            final = self.sparsity.fraction_at(self.n_steps, group)
            is_final = self.sparsity.fraction_at(last_dense, group) == final
            if is_final and final < NONZEROS_BELOW:
                weights += group.parameters
        return weights

    def begin(self) -> None:
        """Hold and release weights as the next step needs it."""
        needed: list[Tensor] = []
        if not self.has_dense_gradient(self.sparsity.steps) and self.rms_ratio is not None:
            needed = self._low_weights()
        if set(map(id, needed)) == set(map(id, self.held)):
            return
        for weight in list(self.held):
            self._release(weight)
        for weight in needed:
            self._hold(weight, Nonzeros(weight))
        self._find_matrices()

    def _hold(self, weight: Tensor, nonzeros: Nonzeros) -> None:
        """Train the nonzero entries of a weight in its place."""
        self.held[weight] = nonzeros
        self._replace(weight, nonzeros.values)
        moments = self.optimizer.state.pop(weight, {})
        for kind, moment in moments.items():
            is_entrywise = moment.shape == weight.shape
            kept = nonzeros.entries(moment) if is_entrywise else moment
            self.optimizer.state[nonzeros.values][kind] = kept

    def _release(self, weight: Tensor) -> None:
        """Train all entries of a weight again."""
        nonzeros = self.held.pop(weight)
        self._replace(nonzeros.values, weight)
        moments = self.optimizer.state.pop(nonzeros.values, {})
        for kind, moment in moments.items():
            is_entrywise = moment.shape == nonzeros.values.shape
            spread = nonzeros.spread(moment) if is_entrywise else moment
            self.optimizer.state[weight][kind] = spread

    def _replace(self, trained: Tensor, by: Tensor) -> None:
        """Give the optimizer another tensor in the place of one."""
        for group in self.optimizer.param_groups:
            group["params"] = [by if each is trained else each for each in group["params"]]

    def _find_matrices(self) -> None:
        """Find the products all of whose weights are held, where they can use only the nonzeros."""
        self.matrices = {}
        for module in self.model.network.modules():
            if not isinstance(module, Product):
                continue
            weights = [getattr(module.owner, name) for name in module.names]
            is_held = all(weight in self.held for weight in weights)
            if is_held and kernel("sampled_product", weights[0]) is not None:
                parts = [self.held[weight] for weight in weights]
                self.matrices[module] = NonzeroMatrix(parts, module.layout)

    @contextmanager
    def in_products(self) -> Iterator[None]:
        """Within the context, the products of held weights compute gradients of nonzeros alone."""
        for product, matrix in self.matrices.items():
            product.trained = matrix
        try:
            yield
        finally:
            for product in self.matrices:
                product.trained = None

    def take_gradients(self) -> None:
        """Move the gradients of weights that are held, but were used whole, to their nonzeros."""
        for nonzeros in self.held.values():
            nonzeros.take_gradient()

    def trained(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """What is trained in the place of each parameter: itself, or its nonzero entries."""
        return [self.held[p].values if p in self.held else p for p in parameters]

    def rms_of_all(self, rms: Float[Tensor, ""], parameters: Iterable[Tensor]) -> Float[Tensor, ""]:
        """The root mean square of the gradients of all entries of all parameters.

        While weights are held, the gradients of their zeros are not known. The root mean square is
        then that of the known ones times a ratio, which is exact for the last dense gradient: that
        of the root mean squares of all gradients and of those that would have been known.

        Args:
            rms: the root mean square of the gradients that are known.
            parameters: the parameters that are trained.
        """
        if self.held and self.rms_ratio is not None:  # nothing is held before there is a ratio
            return rms * self.rms_ratio
        low_ids = set(map(id, self._low_weights()))
        if low_ids:
            known = []
            for parameter in parameters:
                if parameter.grad is not None:
                    is_low = id(parameter) in low_ids
                    gradient = parameter.grad
                    known.append(gradient[parameter != 0] if is_low else gradient)
            rms_of_known = root_mean_square(known, Processes())
            self.rms_ratio = torch.where(rms_of_known > 0, rms / rms_of_known, 1.0)
        return rms

    def project(self) -> None:
        """Apply the weight top-k, which would change nothing in weights that are held."""
        moving = []
        for group in self.sparsity.groups:
            if not any(weight in self.held for weight in group.parameters):
                moving.append(group)
        self.sparsity.project(moving)

    def write(self) -> None:
        """Write the trained values into the weights that are held."""
        for nonzeros in self.held.values():
            nonzeros.write()
        for matrix in self.matrices.values():
            matrix.update()

    def state(self, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        """What the next step needs besides weights and moments; `names` are those of parameters.

        These are the positions of the entries that are held, as "positions/NAME", and the ratio.
        """
        state = {}
        for weight, nonzeros in self.held.items():
            state[f"positions/{names[weight]}"] = nonzeros.positions
        if self.rms_ratio is not None:
            state[RATIO] = self.rms_ratio
        return state

    def load_state(self, state: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> None:
        """Hold what was held when `state` was made. The weights must have been restored before."""
        for weight in list(self.held):
            self._release(weight)
        for weight, name in names.items():
            positions = state.get(f"positions/{name}")
            if positions is not None:
                self._hold(weight, Nonzeros(weight, positions.to(weight.device)))
        self._find_matrices()
        self.rms_ratio = None
        if RATIO in state:
            self.rms_ratio = state[RATIO].to(next(self.model.parameters()).device)


def root_mean_square(tensors: list[Tensor], processes: Processes) -> Float[Tensor, ""]:
    """The root mean square over all entries of all tensors, in float32 or float64.

    Those that are sharded count as a whole.
    """
    n_entries = sum(tensor.numel() for tensor in tensors)
    norms = torch.stack(torch._foreach_norm(parts_of(tensors)))
    squares = processes.total(in_float32(norms).square().sum())
    return (squares / n_entries).sqrt()


def check_positions(name: str, positions: Tensor, weight: Tensor) -> None:
    """Raise `CheckpointError` unless these are indices of entries of a weight, in order."""
    is_index = positions.dtype == torch.int64 and positions.ndim == 1
    if is_index and len(positions) > 0:
        is_in_order = bool((positions.diff() > 0).all())
        is_index = is_in_order and int(positions[0]) >= 0 and int(positions[-1]) < weight.numel()
    if not is_index:
        raise CheckpointError(f"positions/{name} are not the positions of entries of {name}")
