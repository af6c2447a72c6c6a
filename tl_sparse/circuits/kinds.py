"""What the nodes of a circuit are. This file imports nothing, because settings need it."""

from typing import Literal, get_args

#: The entries of activations, or the outputs of whole heads and MLPs.
NodeKind = Literal["channels", "components"]
NODE_KINDS: tuple[NodeKind, ...] = get_args(NodeKind)
