"""Oracle of the head: logits, loss, gradients and decoding in float64 NumPy.

It holds ``[tokens, vocab]`` in memory. Shape suffixes: T tokens, V padded columns, E hidden columns.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.head import LossOptions

__all__ = ["HeadLoss", "argmax", "logits", "logsumexp", "loss", "sample", "top_k"]


@dataclass(frozen=True)
class HeadLoss:
    """Loss, its statistics and its gradients, in float64.

    Attributes:
        loss: 0-d, or one per token for ``reduction="none"``.
        lse: logsumexp of each token's logits, padding excluded.
        logprobs: log-probability of each target; 0 where the target is ignored.
        count: number of targets that count.
        hidden_grad, weight_grad: gradients, shaped as ``hidden`` and ``weight``.
    """

    loss: np.ndarray
    lse: np.ndarray
    logprobs: np.ndarray
    count: int
    hidden_grad: np.ndarray
    weight_grad: np.ndarray


def logits(hidden: np.ndarray, weight: np.ndarray, vocab_size: int, softcap: float | None = None) -> np.ndarray:
    """Logits of every column, ``[*, V]``; -inf in padding columns.

    ``hidden`` is ``[*, E]``, ``weight`` the whole table ``[V, E]``. ``softcap`` bounds logits to
    ``softcap * tanh(logits / softcap)``.

    Example:
        >>> import numpy as np
        >>> from shared.proof.head_oracle import logits
        >>> logits(np.array([2.0]), np.array([[1.0], [3.0], [np.nan]]), vocab_size=2)
        array([  2.,   6., -inf])
    """
    output = np.full((*hidden.shape[:-1], len(weight)), -np.inf)
    output[..., :vocab_size] = hidden.astype(np.float64) @ weight[:vocab_size].astype(np.float64).T
    if softcap is not None:
        output[..., :vocab_size] = softcap * np.tanh(output[..., :vocab_size] / softcap)
    return output


def loss(
    hidden: np.ndarray,
    weight: np.ndarray,
    targets: np.ndarray,
    vocab_size: int,
    options: LossOptions | None = None,
    grad_loss: npt.ArrayLike = 1.0,
    grad_lse: npt.ArrayLike = 0.0,
    grad_logprobs: npt.ArrayLike = 0.0,
) -> HeadLoss:
    """Cross entropy of ``hidden @ weight.T`` against the targets, and its gradients.

    Args:
        hidden: ``[*, E]``.
        weight: the whole table, ``[V, E]``, padding rows included.
        targets: ``[*]``. ``ignore_index`` and every target outside ``[0, vocab_size)`` give no loss.
        vocab_size: rows that are not padding.
        options: of the loss; ``seq_dim``, ``returns`` and ``invalid_targets`` are ignored.
        grad_loss: gradient of the loss: a number, or one per token for ``reduction="none"``.
        grad_lse, grad_logprobs: gradients of ``lse`` and ``logprobs``, one per token.

    Each token's loss is ``lse - (1 - s) * logit[target] - s * mean(logits) + z * lse ** 2``. Here s is
    ``label_smoothing``, z is ``z_loss``, and the mean runs over ``vocab_size`` columns.

    Source: PyTorch's ``F.cross_entropy``; the z-loss of ST-MoE (Zoph et al., 2022, arXiv:2202.08906).

    Example:
        >>> import numpy as np
        >>> from shared.head import LossOptions
        >>> from shared.proof.head_oracle import loss
        >>> found = loss(np.zeros((2, 3)), np.ones((4, 3)), np.array([1, -100]), 4)
        >>> round(float(found.loss), 4), found.count, found.hidden_grad.shape
        (1.3863, 1, (2, 3))
    """
    options = LossOptions() if options is None else options
    shape, targets = targets.shape, np.asarray(targets, np.int64).reshape(-1)
    hidden_TE = hidden.reshape(-1, hidden.shape[-1]).astype(np.float64)
    weight_VE = weight.astype(np.float64)
    counted = (targets >= 0) & (targets < vocab_size) & (targets != options.ignore_index)
    count = int(counted.sum())
    tokens, columns = np.arange(len(targets)), np.where(counted, targets, 0)
    smoothing = options.label_smoothing

    with np.errstate(all="ignore"):  # infinities and NaN propagate
        x = logits(hidden_TE, weight_VE, vocab_size, options.softcap)[:, :vocab_size]
        lse = logsumexp(x)
        target_logit = x[tokens, columns]
        spread = x.mean(axis=1) if smoothing else 0.0
        per_token = lse - (1 - smoothing) * target_logit - smoothing * spread + options.z_loss * lse**2
        per_token = np.where(counted, per_token, 0)
        total = {"none": per_token.reshape(shape), "sum": per_token.sum(), "mean": per_token.sum() / max(count, 1)}

        scale = np.broadcast_to(grad_loss, shape).reshape(-1) / (max(count, 1) if options.reduction == "mean" else 1)
        of_lse, of_logprobs = (np.broadcast_to(grad, shape).reshape(-1) for grad in (grad_lse, grad_logprobs))
        on_lse = np.where(counted, scale * (1 + 2 * options.z_loss * lse) - of_logprobs, 0) + of_lse
        on_target = np.where(counted, of_logprobs - scale * (1 - smoothing), 0)
        on_every = np.where(counted, -scale * smoothing / vocab_size, 0)
        grad = np.exp(x - lse[:, None]) * on_lse[:, None] + on_every[:, None]
        grad[tokens, columns] += on_target
        if options.softcap is not None:
            grad *= 1 - (x / options.softcap) ** 2
        silent = (on_lse == 0) & (on_target == 0) & (on_every == 0)
        grad[silent] = 0
        hidden_grad = np.where(silent[:, None], 0, grad @ weight_VE[:vocab_size])
        weight_grad = np.zeros_like(weight_VE)
        weight_grad[:vocab_size] = grad.T @ np.where(silent[:, None], 0, hidden_TE)
    return HeadLoss(
        np.asarray(total[options.reduction]),
        lse.reshape(shape),
        np.where(counted, target_logit - lse, 0).reshape(shape),
        count,
        hidden_grad.reshape(hidden.shape),
        weight_grad,
    )


def argmax(logits: np.ndarray, vocab_size: int) -> np.ndarray:
    """Id of each token's greatest logit: NaN first, then the lower id.

    Example:
        >>> import numpy as np
        >>> from shared.proof.head_oracle import argmax
        >>> argmax(np.array([[0.0, 2.0, 2.0, 9.0], [-0.0, 0.0, np.nan, 1.0]]), vocab_size=3)
        array([1, 2])
    """
    return np.argmax(logits[..., :vocab_size], axis=-1)


def top_k(logits: np.ndarray, k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The k greatest logits and their ids: NaN first, ties by id.

    Example:
        >>> import numpy as np
        >>> from shared.proof.head_oracle import top_k
        >>> top_k(np.array([1.0, 3.0, 3.0, 2.0, 9.0]), 3, vocab_size=4)
        (array([3., 3., 2.]), array([1, 2, 3]))
    """
    x = logits[..., :vocab_size].astype(np.float64)
    key = np.where(np.isnan(x), -np.inf, -x)  # ascending; the other key tells NaN from +inf
    ids = np.lexsort((key, ~np.isnan(x)), axis=-1)[..., :k]
    return np.take_along_axis(logits, ids, -1), ids


def sample(logits: np.ndarray, uniform: np.ndarray, vocab_size: int) -> np.ndarray:
    """Smallest id whose cumulative probability exceeds ``uniform``; -1 where there is none.

    Args:
        logits: ``[*, V]``; a token with NaN or +inf, or with -inf only, has no distribution.
        uniform: ``[*]``, in [0, 1).
        vocab_size: columns that are not padding.

    Example:
        >>> import numpy as np
        >>> from shared.proof.head_oracle import sample
        >>> sample(np.log([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]]), np.array([0.2, 0.9]), vocab_size=3)
        array([0, 2])
    """
    x = logits[..., :vocab_size].astype(np.float64)
    with np.errstate(all="ignore"):
        cumulative = np.cumsum(np.exp(x - x.max(axis=-1, keepdims=True)), axis=-1)
        above = cumulative > np.asarray(uniform)[..., None] * cumulative[..., -1:]
    return np.where(above.any(axis=-1), above.argmax(axis=-1), -1)


def logsumexp(x: np.ndarray) -> np.ndarray:
    """Logsumexp along the last dimension; -inf of no elements."""
    if x.shape[-1] == 0:
        return np.full(x.shape[:-1], -np.inf)
    top = x.max(axis=-1)
    shift = np.where(top == -np.inf, 0, top)
    return shift + np.log(np.exp(x - shift[..., None]).sum(axis=-1))
