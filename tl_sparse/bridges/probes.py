"""Linear probes of a task's right answer in the residual stream, to compare changes with."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: A probe is trained on at least so many pairs of prompts.
LEAST_PROBE_PAIRS = 8
#: The weight of half the squared norm of the coefficients, beside the sum of the losses.
PENALTY = 1.0
_MAX_STEPS = 200


@dataclass(frozen=True, eq=False)
class Probe:
    """A logistic regression of which answer is right.

    Attributes:
        weight: its coefficients, one for each channel of the stream.
        bias: its constant term.
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, ""]

    def predictions(self, stream: Float[Tensor, "prompt d_model"]) -> Int[Tensor, " prompt"]:
        """The number of the answer, 0 or 1, that the probe takes for the right one."""
        return (stream.to(self.weight) @ self.weight + self.bias > 0).long()

    def moved(
        self, stream: Float[Tensor, "prompt d_model"], to: Float[Tensor, "prompt d_model"]
    ) -> Float[Tensor, "prompt d_model"]:
        """What moves a stream along the direction of the probe to the value of another one."""
        norm = self.weight.norm()
        if norm == 0:  # the probe has found nothing
            return torch.zeros_like(stream)
        direction = self.weight / norm
        distance = (to - stream).to(direction) @ direction
        return (distance[:, None] * direction).to(stream)


def trained_probe(
    streams: Float[Tensor, "prompt d_model"], answers: Int[Tensor, " prompt"]
) -> Probe:
    """Logistic regression on standardised channels, with a penalty on the coefficients.

    Args:
        streams: the stream at the last position of each prompt.
        answers: the number of the right answer, 0 or 1.
    """
    precise = streams.double()
    mean, scale = precise.mean(0), precise.std(0)
    scale = torch.where(scale == 0, 1.0, scale)
    inputs = (precise - mean) / scale
    targets = answers.double()
    weight = torch.zeros_like(mean, requires_grad=True)
    bias = torch.zeros_like(mean[0], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MAX_STEPS, line_search_fn="strong_wolfe"
    )

    def loss_with_gradient() -> Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            inputs @ weight + bias, targets, reduction="sum"
        )
        loss = losses + PENALTY * weight.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(loss_with_gradient)
    in_stream = weight.detach() / scale
    return Probe(in_stream, bias.detach() - in_stream @ mean)
