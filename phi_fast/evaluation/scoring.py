"""Log-likelihoods of continuations; a context is read once for all of its continuations.

A multiple-choice question is one context and several continuations. The context's keys and values are computed once and
copied for each continuation; scoring every (context, continuation) pair alone would read the context again each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.cache import KeyValueCache, pad_left
from ..model.phi import Phi

BATCH_TOKENS = 4096
"""Default size of a batch: rows × longest row, in tokens."""
MAX_LOGITS = 1 << 22
"""Number of logits computed at once: 16 MiB in fp32, which the allocator can reuse without touching new pages."""


@dataclass(frozen=True)
class Request:
    """A continuation to score after a context."""

    context: tuple[int, ...]
    """At least one token."""
    continuation: tuple[int, ...]
    """At least one token."""


Score = tuple[float, bool]
"""Sum of the continuation's token log-probabilities, and whether greedy decoding would generate it."""


def log_likelihoods(
    model: Phi,
    requests: Sequence[Request],
    *,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
) -> Iterator[tuple[int, Score]]:
    """Yield (index into `requests`, score) as batches are done, the longest first, so that time estimates only fall.

    max_length: context length in tokens, at most and by default the model's. A request longer than the context plus one
    loses tokens on its left, as in lm-eval. A continuation that alone is longer than the context is scored in parts;
    lm-eval fails there. Raises ValueError for an empty context or continuation.
    """
    context_length = max_length or model.config.max_position_embeddings
    parts = [(i, part) for i, request in enumerate(requests) for part in _parts(request, context_length)]
    missing = Counter(index for index, _ in parts)
    scores: dict[int, Score] = {}
    pieces = [part for _, part in parts]
    for batch in _batches(_group(pieces, context_length), batch_tokens, context_length):
        for at, (score, greedy) in _score(model, batch, pieces):
            index = parts[at][0]
            before, greedy_before = scores.get(index, (0.0, True))
            scores[index] = before + score, greedy_before and greedy
            missing[index] -= 1
            if not missing[index]:
                yield index, scores.pop(index)


def _parts(request: Request, context_length: int) -> list[Request]:
    """The request itself, or, if its continuation is longer than the context, one request for each part of it. The
    context of a part is everything before it."""
    tokens = request.continuation
    if len(tokens) <= context_length:
        return [request]
    step = max(1, context_length // 2)  # so that every token has at least half a context before it
    return [Request(request.context + tokens[:at], tokens[at : at + step]) for at in range(0, len(tokens), step)]


@dataclass
class _Group:
    """Requests that share a context."""

    context: tuple[int, ...]
    members: list[int]
    longest: int
    """Length of the longest continuation, in tokens."""


def _group(requests: Sequence[Request], context_length: int) -> list[_Group]:
    groups: dict[tuple[int, ...], _Group] = {}
    for index, request in enumerate(requests):
        if not request.context or not request.continuation:
            raise ValueError(
                f"request {index}: a context of {len(request.context)} tokens and a continuation of "
                f"{len(request.continuation)}; expected at least 1 of each"
            )
        room = context_length + 1 - len(request.continuation)  # the last token is only predicted, not read
        context = request.context[-room:]
        group = groups.setdefault(context, _Group(context, [], 0))
        group.members.append(index)
        group.longest = max(group.longest, len(request.continuation))
    return sorted(groups.values(), key=lambda g: (-len(g.context) - g.longest, g.members[0]))


def _batches(groups: list[_Group], batch_tokens: int, context_length: int) -> Iterator[list[_Group]]:
    """Batches of consecutive groups, as long as rows × longest row stays within the limit. A group is never split.

    Rows are padded to the longest context and the longest continuation, which must fit into the model's context
    together.
    """
    batch: list[_Group] = []
    rows = context = new = 0
    for group in groups:
        grown = rows + len(group.members)
        longest_context, longest_new = max(context, len(group.context)), max(new, group.longest)
        longest = longest_context + longest_new
        if batch and (grown * longest > batch_tokens or longest > context_length + 1):
            yield batch
            batch, grown = [], len(group.members)
            longest_context, longest_new = len(group.context), group.longest
        batch.append(group)
        rows, context, new = grown, longest_context, longest_new
    if batch:
        yield batch


@torch.no_grad()
def _score(model: Phi, batch: list[_Group], requests: Sequence[Request]) -> Iterator[tuple[int, Score]]:
    device = model.lm_head.weight.device
    contexts, first = pad_left([group.context for group in batch], device)
    longest = contexts.shape[1]
    cache = KeyValueCache.allocate(model, len(batch), longest, first)
    last = model.decode_hidden(contexts, cache)[:, -1]  # (groups, d): predicts each continuation's first token

    members = [index for group in batch for index in group.members]
    group_of_member = torch.tensor([i for i, group in enumerate(batch) for _ in group.members], device=device)
    continuations = [requests[index].continuation for index in members]
    width = max(map(len, continuations))
    targets = torch.tensor([list(c) + [0] * (width - len(c)) for c in continuations], device=device)
    hidden = last[group_of_member, None]  # (members, width, d)
    if width > 1:
        expanded = _expand(cache, group_of_member, longest + width - 1)
        hidden = torch.cat((hidden, model.decode_hidden(targets[:, :-1], expanded)), 1)
    lengths = torch.tensor([len(c) for c in continuations], device=device)
    counted = torch.arange(width, device=device) < lengths[:, None]
    log_probabilities, greedy = _score_targets(model, model.final_norm(hidden[counted]), targets[counted])
    member_of_token = torch.arange(len(members))[:, None].expand(-1, width)[counted.cpu()]
    sums = torch.zeros(len(members), dtype=torch.float64).index_add_(0, member_of_token, log_probabilities.cpu())
    misses = torch.zeros(len(members)).index_add_(0, member_of_token, (~greedy).float().cpu())
    yield from zip(members, zip(sums.tolist(), (misses == 0).tolist(), strict=True), strict=True)


def _score_targets(model: Phi, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's log-probability (fp64), and whether it is the likeliest token. hidden (n, d), targets (n,)."""
    values, greedy = [], []
    rows = max(1, MAX_LOGITS // model.config.vocab_size)
    for h, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = model.lm_head(h).float()  # (rows, vocab_size)
        values.append((logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)).double())
        greedy.append(logits.argmax(-1) == target)
    return torch.cat(values), torch.cat(greedy)


def _expand(cache: KeyValueCache, rows: Tensor, max_length: int) -> KeyValueCache:
    """A cache whose row i is a copy of row rows[i], with room for `max_length` columns."""
    layers, _, _, heads, head_dim = cache.k.shape
    shape = (layers, len(rows), max_length, heads, head_dim)
    k, v = cache.k.new_zeros(shape), cache.v.new_zeros(shape)
    k[:, :, : cache.length] = cache.k[:, rows, : cache.length]
    v[:, :, : cache.length] = cache.v[:, rows, : cache.length]
    return KeyValueCache(k, v, None if cache.first is None else cache.first[rows], cache.length)
