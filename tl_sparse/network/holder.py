"""Modules that can hold their weights compact, without a dense copy in memory."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tl_sparse.network.compact import Compact


class WeightsHolder(nn.Module):
    """A module that can hold weights compact instead of as parameters.

    Each access to a compact weight makes a dense copy of it, so in-place changes to that copy are
    lost. A weight that is assigned, or loaded from a state_dict, is held compact again.
    """

    def hold_compact(self, name: str, weight: Compact) -> None:
        """Hold the weight called `name` compact, instead of as a parameter."""
        self._parameters.pop(name, None)
        self.__dict__.setdefault("compact", {})[name] = weight

    @property
    def _held(self) -> dict[str, Compact]:
        """The compact weights by name. A module that holds none does not have the attribute."""
        return self.__dict__.get("compact", {})

    def dense_copies(self) -> Iterator[tuple[str, Tensor]]:
        """The name and a dense copy of each weight that is held compact, one at a time."""
        for name in self._held:
            yield name, getattr(self, name)

    def __getattr__(self, name: str) -> Any:
        weight = self._held.get(name)
        if weight is None:
            return super().__getattr__(name)
        return weight.dense(weight.values.device, weight.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._held and isinstance(value, Tensor):
            self.hold_compact(name, Compact.of(value))
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert the compact weights with the parameters; `Module.to` calls this."""
        for name, weight in self._held.items():
            self.hold_compact(name, weight.mapped(fn))
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self.dense_copies():
            destination[prefix + name] = weight

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        remaining = dict(state_dict)
        for name, held in self._held.items():
            key = prefix + name
            weight = remaining.pop(key, None)
            if weight is None:
                missing_keys.append(key)
            elif weight.shape != held.shape:
                shapes = f"{list(weight.shape)}, not {list(held.shape)}"
                error_msgs.append(f"size mismatch for {key}: {shapes}")
            else:
                self.hold_compact(name, Compact.of(weight.to(held.values)))
        super()._load_from_state_dict(
            remaining, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
