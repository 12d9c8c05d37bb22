"""Load a rank's rows of a Hugging Face checkpoint, whose table lies in one of several files.

Run: python examples/load_huggingface.py [FOLDER]
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from torch_impl import ParallelVocabEmbedding

if len(sys.argv) > 1:
    folder = Path(sys.argv[1])
else:  # a small checkpoint of the usual form
    folder = Path(tempfile.mkdtemp())
    tensors = {"model.embed_tokens.weight": torch.randn(1000, 16).bfloat16(), "model.norm.weight": torch.ones(16)}
    names = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(tensors, start=1)}
    for name, file in names.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

for rank in range(3):  # each rank reads its own rows and no others
    emb = ParallelVocabEmbedding.from_table(folder, rank=rank, world_size=3, padded_vocab_size="even")
    start, stop = emb.partition.owned_range(rank)
    print(f"rank {rank}: rows {start} to {stop - 1} of {emb.vocab_size}, {tuple(emb.weight.shape)} {emb.weight.dtype}")
