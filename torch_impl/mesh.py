"""A table as a DTensor over a one-dimensional DeviceMesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # importing it takes half a second
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["as_dtensor", "local_rows", "resolve_mesh"]


def resolve_mesh(device_mesh: DeviceMesh | None, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Process group of the mesh; ``process_group`` if there is no mesh.

    Raises:
        TypeError: ``device_mesh`` is not a DeviceMesh.
        ValueError: the mesh has several dimensions, lacks this process, or comes with a ``process_group``.
    """
    if device_mesh is None:
        return process_group
    if process_group is not None:
        raise ValueError("process_group must be left out with device_mesh, which has a group of its own")
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(device_mesh, DeviceMesh):
        raise TypeError(
            f"device_mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(device_mesh).__name__}; "
            f"init_device_mesh makes one"
        )
    if device_mesh.ndim != 1:
        raise ValueError(
            f"device_mesh must have one dimension, got {device_mesh.ndim}, {device_mesh.mesh_dim_names}: pass the "
            f'dimension that splits the vocabulary, such as mesh["tp"]'
        )
    if device_mesh.get_coordinate() is None:
        raise ValueError(f"device_mesh must hold this process, got {device_mesh}")
    return device_mesh.get_group()


def as_dtensor(rows: Tensor, device_mesh: DeviceMesh, table_rows: int) -> Tensor:
    """Wrap the ranks' rows as one DTensor ``[table_rows, e]``, ``Shard(0)``, sharing memory.

    ``rows`` are contiguous: ``ceil(table_rows / w)`` on each rank, fewer or none on the last ones.
    """
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size([table_rows, rows.shape[1]])
    return DTensor.from_local(rows, device_mesh, [Shard(0)], run_check=False, shape=shape, stride=(rows.shape[1], 1))


def local_rows(weight: Tensor) -> Tensor:
    """This rank's rows of a DTensor, as a differentiable plain tensor.

    Raises:
        ValueError: ``weight`` is not a DTensor ``Shard(0)`` over one dimension.
    """
    placements = getattr(weight, "placements", None)
    if placements is None or len(placements) != 1 or not placements[0].is_shard(0):
        found = "a plain tensor" if placements is None else f"{placements} over {getattr(weight, 'device_mesh', None)}"
        raise ValueError(
            f"weight must be a DTensor Shard(0) over the layer's device_mesh, got {found}: after fully_shard call the "
            f"module itself, whose hooks gather the rows, and put a tied head into its group, "
            f"fully_shard([model.embedding, model.head]); assign values by weight.copy_(...) or load_state_dict"
        )
    return weight.to_local()  # type: ignore[attr-defined]
