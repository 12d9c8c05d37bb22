"""Parallel style for ``parallelize_module`` that replaces an ``nn.Embedding``."""

from functools import lru_cache

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from torch_impl.files import options_of
from torch_impl.private_api import distribute_rows
from torch_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["VocabParallel"]


class VocabParallel(ParallelStyle):
    """Parallel style that splits an ``nn.Embedding`` over the vocabulary in place.

    The module remains an instance of its class under its name, and becomes a ``ParallelVocabEmbedding`` built
    with ``device_mesh``. Its weight ``[v, e]`` becomes a DTensor, ``Shard(0)``; where the ranks do not divide ``v``,
    the last ones have fewer rows. Rows come from ``src_data_rank``'s weight, or with None from each rank's own. A
    weight on the meta device stays there until ``to_empty`` and ``reset_parameters``. Tie the output layer's weight
    afterwards, and call ``fully_shard`` last.

    Args:
        input_layouts: layout of ids that are plain tensors: ``Replicate()``, the same on all ranks; ``Shard(d)``, each
            rank's equal part along dimension d.
        output_layouts: ``Replicate()``, the embedding on every rank; ``Shard(d)``, each rank's equal part along
            dimension d of the ids, such as ``Shard(1)`` for the sequence of ``[b, s]``.
        use_local_output: return a plain tensor; False: a DTensor of ``output_layouts``.

    Raises:
        TypeError: the module is not an ``nn.Embedding``.
        ValueError: a layout is not one of these; the weight is already a DTensor; the ``nn.Embedding`` has
            ``max_norm``, ``scale_grad_by_freq`` or ``sparse``; the mesh has several dimensions.

    Source: RowwiseParallel of PyTorch.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.tensor import Shard
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from torch_impl.adapters import VocabParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        >>> model = torch.nn.ModuleDict({"tok_embeddings": torch.nn.Embedding(10, 4)})
        >>> model = parallelize_module(model, mesh["tp"], {"tok_embeddings": VocabParallel(output_layouts=Shard(1))})
        >>> model["tok_embeddings"].weight.placements
        (Shard(dim=0),)
        >>> model["tok_embeddings"](torch.tensor([[3, 9]])).shape
        torch.Size([1, 2, 4])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = _checked("input_layouts", input_layouts)
        self.output_layouts = _checked("output_layouts", output_layouts)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.Embedding) or isinstance(module, ParallelVocabEmbedding):
            raise TypeError(
                f"VocabParallel must be given an nn.Embedding, got {type(module).__name__}; "
                f"a ParallelVocabEmbedding is built with device_mesh= instead"
            )
        weight = module.weight
        if isinstance(weight, DTensor):
            raise ValueError("VocabParallel must come first, got a weight that is a DTensor: call fully_shard after it")
        shard = self.output_layouts if isinstance(self.output_layouts, Shard) else None
        options = options_of(module) | {"device_mesh": device_mesh, "dtype": weight.dtype, "device": "meta"}
        options |= (
            {"reduction": "all_reduce"} if shard is None else {"reduction": "reduce_scatter", "seq_dim": shard.dim}
        )
        layer = ParallelVocabEmbedding(*weight.shape, **options)
        # parallelize_module keeps the module that it has, so that one becomes the layer and keeps hooks and attributes.
        module.__class__ = _class_from(type(module))  # type: ignore[arg-type]
        vars(module).update({name: value for name, value in vars(layer).items() if name not in vars(module)})
        assert isinstance(module, _VocabParallelEmbedding)
        module.style = self
        module.allocate(weight.dtype, weight.device)
        if not weight.is_meta:
            module.own_rows()[0].copy_(distribute_rows(weight.detach(), device_mesh, self).to_local())
        module.weight.requires_grad_(weight.requires_grad)
        return module

    def __repr__(self) -> str:
        names = ("input_layouts", "output_layouts", "use_local_output")
        return f"VocabParallel({', '.join(f'{name}={getattr(self, name)}' for name in names)})"


class _VocabParallelEmbedding(ParallelVocabEmbedding, nn.Embedding):  # type: ignore[override]
    """The layer as an ``nn.Embedding``."""

    weight: nn.Parameter
    style: VocabParallel

    def forward(self, input: Tensor) -> Tensor:  # nn.Embedding's name for ids
        style, mesh = self.style, self.device_mesh
        if not isinstance(input, DTensor) and not style.input_layouts.is_replicate():
            input = DTensor.from_local(input, mesh, [style.input_layouts], run_check=False)
        if isinstance(input, DTensor):
            input = input.redistribute(placements=[Replicate()]).to_local()
        output = super().forward(input)
        if style.use_local_output:
            return output
        return DTensor.from_local(output, mesh, [style.output_layouts], run_check=False)


@lru_cache
def _class_from(cls: type[nn.Embedding]) -> type[nn.Embedding]:
    """Subclass of the same kind whose ``super().forward`` is the layer's."""
    if cls is nn.Embedding:
        return _VocabParallelEmbedding
    return type(f"VocabParallel{cls.__name__}", (cls, _VocabParallelEmbedding), {})


def _checked(name: str, layout: Placement | None) -> Placement:
    if layout is None:
        return Replicate()
    if not isinstance(layout, Replicate) and not (isinstance(layout, Shard) and layout.dim >= 0):
        raise ValueError(f"{name} must be Replicate() or Shard(d) of a dimension d >= 0 of the ids, got {layout!r}")
    return layout
