"""Monitoring of a training run: its losses, log and progress bar."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.data import Corpus
from tl_sparse.training.measures import dead_neurons, evaluate_loss
from tl_sparse.training.runs import Run
from tl_sparse.training.tokens import tokens_per_step
from tl_sparse.training.trainer import Trainer

#: The number of steps between two lines of the log, and two updates of the progress bar's text.
LOG_STEPS = 20
#: The number of steps between measurements of the share of dead neurons; a multiple of LOG_STEPS.
DEAD_NEURONS_STEPS = 100
#: The number of earlier losses with whose mean a loss is compared to see whether it has jumped.
USUAL_STEPS = 100


@dataclass(frozen=True)
class Stop:
    """Why training stops early.

    Attributes:
        reason: what happened.
        can_go_on: whether the run can be resumed from the state that is saved.
        larger: the setting that must be larger then, if any.
    """

    reason: str
    can_go_on: bool = True
    larger: str = ""


class Monitor:
    """Watches a trainer, one step at a time.

    Args:
        trainer: the trainer, before the first step that is watched.
        losses: the losses of all steps of the run, which are filled in as the steps are taken.
        corpus: the tokens of the run; validation loss and dead neurons are measured on its
            validation rows.
        run: the run whose log is written; None writes no log.
        show_bar: whether to show the progress bar.

    Attributes:
        bar: the progress bar; iterating over it yields the numbers of the remaining steps.
    """

    def __init__(
        self,
        trainer: Trainer,
        losses: Float[Tensor, " step"],
        corpus: Corpus,
        run: Run | None,
        show_bar: bool,
    ) -> None:
        self.trainer = trainer
        self.losses = losses
        self.validation = corpus.validation
        self.run = run
        self.first_step = trainer.steps_done
        self.tokens_per_step = tokens_per_step(trainer.config, corpus.train)
        self.dead_neurons: float | None = None  # the latest measurement
        n_steps = trainer.config.steps
        self.bar = tqdm(
            range(self.first_step, n_steps),
            desc="training",
            total=n_steps,
            initial=self.first_step,
            disable=not show_bar,
            unit="step",
        )

    def reason_to_stop(self, step: int) -> Stop | None:
        """Why training has to stop after step number `step`; None if it can continue."""
        config = self.trainer.config
        loss = float(self.losses[step])
        usual = loss
        if step > 0:
            usual = float(self.losses[max(0, step - USUAL_STEPS) : step].mean())
        change = f"the loss went from {usual:.3f} to {loss:.3f}"
        advice = f"a smaller lr than {config.lr} may help"
        if not math.isfinite(loss):
            return Stop(f"{change}; {advice}", can_go_on=False)
        if loss - usual >= config.max_jump and not self.trainer.objective.may_jump:
            larger = f"max_jump (--max-jump) than {config.max_jump}"
            return Stop(f"{change}; {advice}", larger=larger)
        signal = self.trainer.processes.stop
        is_last = self.trainer.steps_done == config.steps
        if signal is not None and not is_last:
            return Stop(f"stopped by {signal.name}")
        return None

    def is_due(self, done: int, interval: int = LOG_STEPS) -> bool:
        """Whether `done` is a multiple of `interval`, or the last step."""
        return done % interval == 0 or done == self.trainer.config.steps

    def log(self, done: int) -> dict[str, float]:
        """Measure the model after `done` steps, and report it to the log, the tracker and the bar.

        Returns:
            The measurements by name, as they are in the log.
        """
        measured = self._measure(done)
        if self.run is not None:
            self.run.write_log(measured)
        self.trainer.processes.track(done, measured)
        self._show(measured)
        return measured

    def _measure(self, done: int) -> dict[str, float]:
        trainer = self.trainer
        config = trainer.config
        last_step = done - 1
        recent = self.losses[max(0, done - LOG_STEPS) : done]
        measured = {
            "step": done,
            "loss": float(recent.mean()),
            "lr": trainer.lr(last_step),
            "l0": trainer.sparsity.fraction_at(last_step),
        }
        measured |= trainer.objective.measured()
        if self.is_due(done, DEAD_NEURONS_STEPS):
            rows = self.validation[: config.batch_size]
            self.dead_neurons = dead_neurons(trainer.model, rows)
            measured["dead_neurons"] = self.dead_neurons
        # Measured at the first line of the log at or after each multiple of validate_steps.
        if config.validate_steps and done % config.validate_steps < LOG_STEPS:
            measured["validation_loss"] = self._validation_loss()
        return measured

    def _validation_loss(self) -> float:
        """The loss on the validation rows, averaged so that all processes have the same value."""
        model = self.trainer.model
        loss = evaluate_loss(model, self.validation, self.trainer.config.batch_size)
        device = next(model.parameters()).device
        return float(self.trainer.processes.average(torch.tensor(loss, device=device)))

    def _show(self, measured: dict[str, float]) -> None:
        seconds = self.bar.format_dict["elapsed"] or 1e-9
        tokens = (measured["step"] - self.first_step) * self.tokens_per_step
        parts = [f"loss {measured['loss']:.3f}", f"L0 {measured['l0']:.1%}"]
        if self.dead_neurons is not None:
            parts.append(f"{self.dead_neurons:.0%} of neurons dead")
        parts.append(f"{tokens / seconds:,.0f} tokens/s")
        self.bar.set_postfix_str(", ".join(parts))
