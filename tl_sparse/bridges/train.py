"""`train_bridges`: a sparse model trained beside a frozen dense one, with bridges between them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tl_sparse.arguments import checked
from tl_sparse.bridges.config import BridgeConfig
from tl_sparse.bridges.loading import as_model, load_bridges
from tl_sparse.bridges.objective import BridgeObjective
from tl_sparse.bridges.pair import Bridges
from tl_sparse.bridges.streams import check_has_sites
from tl_sparse.checkpoints import open_model, resolve_device
from tl_sparse.config import merged
from tl_sparse.errors import BridgeError, TokenizerError, TrainError
from tl_sparse.hooks import TLModel, frozen
from tl_sparse.training import config_of_run, settings_of_run, train_towards


@checked("out", "device")
def train_bridges(
    dense: TLModel | str | Path,
    config: BridgeConfig | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    resume: bool = False,
    dense_source: str = "",
) -> tuple[Bridges, dict[str, Any]]:
    """Train a sparse model beside a frozen dense one, with bridges between their streams.

    The trainer is that of `tl_sparse.train`, with all it can do: recipes, checkpoints, exact
    resumption, and several processes under `accelerate launch`. `log.jsonl` gets the terms of the
    loss by site.

    Args:
        dense: the dense model, any TransformerLens model with a tokenizer, or its folder or name.
            It is left as it is.
        config: the settings; None means `BridgeConfig.fitting(dense)` or, to resume a run, the
            configuration of that run.
        out: a folder for the sparse model, its bridges and the record; None saves nothing.
            `load_bridges` opens it, and `tl_sparse.load` opens its sparse model alone.
        device: the device; None is that of a given dense model or else the GPU if there is one.
        progress: whether to show a progress bar.
        resume: whether to continue the unfinished run in `out`; see `tl_sparse.train`.
        dense_source: the folder or name from which a given model was opened, by which
            `load_bridges` finds it again; by default the name that the model has.

    Returns:
        The bridges with both models, in eval mode, and the record of the training. Its
        "bridge_losses" are the losses by site on validation text.

    Raises:
        BridgeError: if the sparse model of the configuration does not fit the dense one.
        TokenizerError: if the dense model has no tokenizer.
        ConfigError, DataError, TrainError, CheckpointError: as for `tl_sparse.train`.
        UnsupportedError: if the dense model has no stream between attention and MLP.
    """
    if isinstance(dense, str | Path):
        dense_source = str(dense)
        dense = open_model(dense, device)
    else:
        dense = as_model(dense)
        device = device if device is not None else next(dense.parameters()).device
    check_has_sites(dense)
    if dense.tokenizer is None:
        raise TokenizerError("the dense model has no tokenizer, with which text becomes its tokens")
    if config is None:
        config = BridgeConfig.fitting(dense)
        if out is not None and resume:
            config = bridge_config_of_run(out)
    _check_fits(config, dense)
    dense.to(resolve_device(device))
    with frozen(dense):
        objective = BridgeObjective(dense, config, dense_source)
        _, record = train_towards(objective, config.train, out, device, progress, resume)
    if out is not None and objective.sparse is None:  # an earlier call had trained and saved all
        return load_bridges(out, dense), record
    facts = {name: record[name] for name in ("bridges", "bridge_losses")}
    return objective.bridges().with_record(facts), record


def bridge_config_of_run(folder: str | Path) -> BridgeConfig:
    """The configuration of the unfinished run with bridges in a folder.

    Raises:
        TrainError: if there is none, or its settings are damaged.
    """
    settings = settings_of_run(Path(folder)).get("objective", {})
    if settings.get("command") != BridgeObjective.command:
        raise TrainError(f"{folder} holds a training run without bridges")
    fields: Mapping[str, Any] = {
        name: value for name, value in settings.items() if name not in ("command", "dense")
    }
    config: BridgeConfig = merged(BridgeConfig(train=config_of_run(folder)), fields)
    return config


def _check_fits(config: BridgeConfig, dense: TLModel) -> None:
    """Raise `BridgeError` if the sparse model of a configuration does not fit the dense model."""
    model = config.train.model
    for name in ("n_layers", "d_vocab"):
        ours, needed = getattr(model, name), getattr(dense.cfg, name)
        if ours != needed:
            raise BridgeError(
                f"{name} = {ours} of the sparse model must be {needed}, as in the dense model; "
                "BridgeConfig.fitting(dense, train) makes a configuration that fits"
            )
    if model.n_ctx > dense.cfg.n_ctx:
        raise BridgeError(
            f"n_ctx = {model.n_ctx} of the sparse model must be at most {dense.cfg.n_ctx}, the "
            "context of the dense model"
        )
