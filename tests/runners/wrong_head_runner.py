"""A head in NumPy, split over the ranks as in a textbook, with the fault that HEAD_FAULT names."""

import os

import ml_dtypes
import numpy as np

from shared.bits import DTYPES
from shared.proof.head_case import HeadCase, HeadWriter
from shared.proof.launch import serve

FAULT = os.environ["HEAD_FAULT"]


def run(case, record, progress):
    w, v, n, dtype = case.world_size, case.vocab_size, case.partition.rows_per_rank, DTYPES[case.dtype]
    hidden = case.hidden_states().reshape(-1, case.emb_size).astype(np.float32)
    table = np.concatenate([case.rank_rows(rank) for rank in range(w)]).astype(np.float32)
    targets = case.batch_array("targets").reshape(-1)
    counted = (targets >= 0) & (targets < v)
    count = len(targets) if FAULT == "mean over all" else 1 if FAULT == "sum" else counted.sum()
    columns = np.where(counted, targets, 0)
    if FAULT == "target off by one":
        columns = (columns + 1) % v

    logits = hidden @ table.T
    if FAULT == "bfloat16 logits":
        logits = logits.astype(ml_dtypes.bfloat16).astype(np.float32)
    exponentials = np.exp(logits)
    if FAULT != "padding counted":
        exponentials[:, v:] = 0
    sums = np.stack([part.sum(1) for part in np.split(exponentials, w, axis=1)])
    total = sums[[0, *range(2, w)]].sum(0) if FAULT == "rank missing" else sums.sum(0)
    if FAULT == "gathered logits":
        total = total * w
    logprobs = np.where(counted, logits[np.arange(len(targets)), columns] - np.log(total), 0)

    grad = exponentials / total[:, None]
    grad[np.arange(len(targets)), columns] -= 1
    grad = np.where(counted[:, None], grad / count, 0)
    parts = [grad[:, r * n : (r + 1) * n] @ table[r * n : (r + 1) * n] for r in range(w)]
    hidden_grad = sum(parts).astype(dtype)
    table_grad = (grad.T @ hidden).astype(dtype)
    if case.tied and FAULT != "lookup missing":
        ids = case.batch_array("ids").reshape(-1)
        lookup, valid = np.zeros_like(table), (ids >= 0) & (ids < v)
        np.add.at(lookup, ids[valid], hidden_grad[valid].astype(np.float32))
        table_grad = table_grad + lookup.astype(dtype)
    argmax = logits[:, :v].argmax(1)
    for rank in range(w):
        loss = np.float32(-logprobs.sum() / count)
        record.add(f"loss.{rank}", np.nextafter(loss, np.float32(9)) if FAULT == "disagreeing" and rank == 1 else loss)
        record.add(f"logprobs.{rank}", logprobs.astype(np.float32))
        of_hidden = parts[rank] if FAULT == "not summed" else hidden_grad * (w if FAULT == "times w" else 1)
        record.add(f"hidden gradient.{rank}", of_hidden.astype(dtype))
        record.add(f"table gradient.{rank}", table_grad[rank * n : (rank + 1) * n])
        record.add(f"argmax.{rank}", argmax % n if FAULT == "local ids" else argmax)


if __name__ == "__main__":
    serve("torch", {}, run, HeadCase, HeadWriter)
