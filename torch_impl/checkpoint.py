"""State dicts for torch.distributed.checkpoint, with rows of whole, unpadded tables."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_impl.files import TableInFiles
from torch_impl.table_rows import TableRows

__all__ = ["local_state_dict", "sharded_state_dict"]


def sharded_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a state dict for ``torch.distributed.checkpoint`` to save and load.

    Tables of the model's layers, and an optimizer's state of their rows, become rows of whole tables. Any number of
    ranks with any padding can load them. Loading overwrites the given tensors' memory. Always convert: ``dcp.save`` of
    a plain state dict keeps one rank's rows and reports no error.

    Args:
        model: holds the layers; ``fully_shard`` may have split them further.
        state_dict: a model's, from ``get_model_state_dict`` or ``model.state_dict()``; or an optimizer's, from
            ``get_optimizer_state_dict`` of ``torch.distributed.checkpoint.state_dict``. Not modified.

    Returns:
        A copy of the dictionaries with equal keys. After ``dcp.load`` convert it back with ``local_state_dict``, then
        call ``load_state_dict``, ``set_model_state_dict`` or ``set_optimizer_state_dict``.

    Raises:
        ValueError: the state dict has no table of the model, or names parameters by numbers; an optimizer's state of a
            table is neither one number nor one entry per row; a table is on the meta device.

    Example:
        >>> import tempfile, torch, torch.distributed.checkpoint as dcp
        >>> from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
        >>> from torch_impl import ParallelVocabEmbedding, local_state_dict, sharded_state_dict
        >>> model = torch.nn.Sequential(ParallelVocabEmbedding(10, 4, padded_vocab_size=12))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model(torch.tensor([3])).sum().backward()
        >>> optimizer.step()
        >>> state = sharded_state_dict(model, get_optimizer_state_dict(model, optimizer))
        >>> state["state"]["0.weight"]["exp_avg"]
        TableRows([0:10] of (10, 4), torch.float32, cpu)
        >>> folder = tempfile.mkdtemp()
        >>> _ = dcp.save({"optimizer": state}, checkpoint_id=folder, no_dist=True)
        >>> dcp.load({"optimizer": state}, checkpoint_id=folder, no_dist=True)
        >>> set_optimizer_state_dict(model, optimizer, local_state_dict(state))
    """
    tables = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, TableInFiles)}
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = inner.named_parameters(remove_duplicate=False)  # a tied head names the table again
    layers = {_without_wrappers(name): tables[id(each)] for name, each in parameters if id(each) in tables}
    of_optimizer = any(str(key).partition(".")[0] in ("state", "param_groups") for key in state_dict)
    found = False

    def walk(value: Any, path: str) -> Any:
        nonlocal found
        if isinstance(value, Mapping):
            return {key: walk(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        for name, layer in layers.items():
            if isinstance(value, Tensor) and (path == name or path.startswith(f"state.{name}.")):
                found = True
                return _rows_of_tables(value, layer, path)
        return value

    prefix = "module." if inner is not model else ""  # of DistributedDataParallel's state_dict()
    keys = [_without_wrappers(key.removeprefix(prefix)) for key in state_dict]
    result = walk(dict(zip(keys, state_dict.values(), strict=True)), "")
    if of_optimizer and any(isinstance(key, int) for key in state_dict.get("state", ())):
        raise ValueError(
            "state_dict must name parameters as the model does, got numbers: call get_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict"
        )
    if not found and not of_optimizer:
        raise ValueError(
            f"state_dict must be of the model or of its optimizer, and hold {' or '.join(layers) or 'a table'}, "
            f"got {sorted(map(str, state_dict))[:8]}"
        )
    return dict(zip(state_dict, result.values(), strict=True))


def local_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert back to this rank's own rows, for modules and optimizers.

    Args:
        state_dict: from ``sharded_state_dict``, loaded or not. Not modified.

    Example:
        >>> import torch
        >>> from torch_impl import ParallelVocabEmbedding, local_state_dict, sharded_state_dict
        >>> emb = ParallelVocabEmbedding(10, 4, rank=1, world_size=2)
        >>> state = sharded_state_dict(emb, emb.state_dict())
        >>> state["weight"].shape, local_state_dict(state)["weight"].shape
        (torch.Size([10, 4]), torch.Size([5, 4]))
    """

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        return value.rank_rows if isinstance(value, TableRows) else value

    return walk(state_dict)


def _rows_of_tables(value: Tensor, layer: TableInFiles, path: str) -> Tensor:
    if value.is_meta:
        raise ValueError(f"{path} must have storage to be saved or loaded: call to_empty(device=...) first")
    if layer.device_mesh is not None and layer.table_rows == layer.vocab_size:  # an unpadded DTensor
        return value
    if value.dim() and value.shape[0] == layer.weight.shape[0]:
        return TableRows(value, layer.partition, layer.rank)
    if value.numel() == 1:  # a count of steps
        return value
    raise ValueError(
        f"{path} must be one number or have one entry for each of the rank's {layer.weight.shape[0]} rows, got "
        f"{list(value.shape)}, which ranks cannot share: use an optimizer that treats rows alike, such as Adam"
    )


def _without_wrappers(name: str) -> str:
    """Parameter name as in torch.distributed.checkpoint.state_dict, without wrappers."""
    return re.sub(r"\b(_orig_mod|_checkpoint_wrapped_module)\.", "", name)
