"""What `fork_server` imports: whatever a model and an optimizer import when they are first used."""

import accelerate  # noqa: F401
import torch

import tl_sparse.training  # noqa: F401
from helpers import random_tokens, tiny_model

_model = tiny_model()
_loss = _model(random_tokens(_model), return_type="loss")
_loss.backward()
torch.optim.AdamW(_model.parameters()).step()
