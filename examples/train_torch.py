"""Train with sequence parallelism: each rank holds its rows of the table and its part of the sequence.

Run: torchrun --standalone --nproc-per-node 4 examples/train_torch.py
"""

import os

import torch
import torch.distributed as dist

from torch_impl import ParallelVocabEmbedding

gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
rank, w = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
emb = ParallelVocabEmbedding(
    vocab_size=32000,
    emb_size=64,
    process_group=dist.group.WORLD,
    device=device,
    reduction="reduce_scatter",
    seq_dim=0,
    init_std=0.02,
)
head = torch.nn.Linear(64, 1).to(device)  # the same on all ranks
optimizer = torch.optim.Adam([emb.weight, *head.parameters()], lr=0.01)
ids = torch.randint(0, 32000, (128, 4)).to(device)  # [s, b], the same on all ranks
for step in range(5):
    hidden = emb(ids)  # [s / w, b, e]: this rank's part of the sequence
    loss = (head(hidden) - 1).square().sum() / ids.numel()
    optimizer.zero_grad()
    loss.backward()  # emb.weight.grad is complete: it sums all parts
    for parameter in head.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    dist.all_reduce(total := loss.detach().clone())
    if rank == 0:
        print(f"step {step}: loss {total.item():.3f}, {tuple(hidden.shape)} on each of {w} ranks")
dist.barrier()
dist.destroy_process_group()
