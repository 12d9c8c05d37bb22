"""Train over a 2-D mesh: the vocabulary split over "tp", FSDP2 over "dp", one checkpoint for any sizes of both.

Run: torchrun --standalone --nproc-per-node 4 examples/train_mesh.py TP SAVE_TO [LOAD_FROM]
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from torch_impl import ParallelLMHead, ParallelVocabEmbedding, clip_grad_norm_


class Model(torch.nn.Module):
    def __init__(self, tp):
        super().__init__()
        self.embedding = ParallelVocabEmbedding(
            32000, 64, device_mesh=tp, reduction="all_reduce", init="global", init_std=0.02
        )
        self.middle = torch.nn.Linear(64, 64)
        self.head = ParallelLMHead(self.embedding, tied=True)

    def forward(self, ids, targets):
        return self.head(self.middle(self.embedding(ids)), targets)


tp, folder, *old = int(sys.argv[1]), *sys.argv[2:]
gpu = torch.cuda.is_available()
if gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if gpu else "gloo")
mesh = dist.init_device_mesh("cuda" if gpu else "cpu", (dist.get_world_size() // tp, tp), mesh_dim_names=("dp", "tp"))
torch.manual_seed(0)
with torch.device(mesh.device_type):
    model = Model(mesh["tp"])
    ids = torch.randint(0, 32000, (4, 129))  # the same on all ranks
fully_shard([model.embedding, model.head], mesh=mesh["dp"])  # the table is gathered while either is used
fully_shard(model, mesh=mesh["dp"])
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)


def state():
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


for checkpoint in old:
    dcp.load(saved := state(), checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
mine = ids.chunk(mesh["dp"].size())[mesh.get_local_rank("dp")]  # this data-parallel rank's part of the batch
for _ in range(3):
    loss = model(mine[:, :-1], mine[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_(model, 0.1)  # over all ranks of both dimensions
    optimizer.step()
    dist.all_reduce(loss := loss.detach() / mesh["dp"].size(), group=mesh.get_group("dp"))
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.3f}, norm {norm.item():.3f}, dp x tp = {mesh['dp'].size()} x {tp}")
dcp.save(state(), checkpoint_id=folder)
last = dist.barrier(async_op=True)  # kept: gloo aborts if its thread frees it at exit (torch 2.13)
last.wait()
dist.destroy_process_group()
