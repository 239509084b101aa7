"""
Block diffusion by its definition: one forward for each block of each draw, the noised block behind clean text.

Shares no code with what it tests: a forward is that of tests/decoder_reference.py, told token by token what it sees.
"""

import torch


def numbers_of(length, size, origin=0):
    """The block of each token of a row, counted from the token `origin`."""
    return [(i - origin) // size for i in range(length)]


def block_log_probs(logits, ids, masked, numbers, shift=0, mask_token_id=2):
    """
    `(K, T)` log-probabilities of hidden tokens, zero elsewhere.

    Args:
        logits: `(1, T)` tokens and `(1, T, T)` who sees whom, to `(1, T, V)`.
        ids: `(T,)` prompt and response.
        masked: `(K, T)` bool.
        numbers: the block of each token.
        shift: how far before a token its logits stand.
    """
    found = [[torch.zeros(()) for _ in ids] for _ in masked]
    for k, hidden in enumerate(masked.tolist()):
        for block in sorted({number for number, h in zip(numbers, hidden, strict=True) if h}):
            row = [
                mask_token_id if h and n == block else i for i, h, n in zip(ids.tolist(), hidden, numbers, strict=True)
            ]
            row = row[: 1 + max(i for i, number in enumerate(numbers) if number == block)]
            sees = [[numbers[j] <= numbers[i] for j in range(len(row))] for i in range(len(row))]
            log_probs = logits(torch.tensor([row]), torch.tensor([sees]))[0].log_softmax(-1)
            for i in range(len(row)):
                if hidden[i] and numbers[i] == block:
                    found[k][i] = log_probs[max(i - shift, 0), ids[i]]
    return torch.stack([torch.stack(row) for row in found])


def of_model(model):
    """A model of transformers as such a forward: it is told who sees whom."""
    eager = model.config._attn_implementation == "eager"

    def logits(ids, sees):
        mask = torch.where(sees, 0.0, torch.finfo(model.dtype).min) if eager else sees
        return model(input_ids=ids, attention_mask=mask.unsqueeze(1)).logits

    return logits


def block_numbers(batch, size, origin="sequence"):
    """`(B, L)` the block of each token of a padded batch."""
    numbers = torch.zeros_like(batch["input_ids"])
    for row, (real, labels) in enumerate(zip(batch["attention_mask"].bool(), batch["labels"], strict=True)):
        first = int((labels[real] != -100).int().argmax()) if origin == "response" else 0
        numbers[row, real] = torch.tensor(numbers_of(int(real.sum()), size, first))
    return numbers


def block_terms(logits, batch, draws, numbers, shift=0):
    """`(B, L)` terms of the ELBO of a padded batch."""
    rows = []
    for row, real in enumerate(batch["attention_mask"].bool()):
        log_probs = block_log_probs(
            logits, batch["input_ids"][row, real], draws.masked[:, row, real], numbers[row, real].tolist(), shift
        )
        of_row = (log_probs * draws.weight[:, row, real]).sum(0)
        rows.append(torch.zeros(len(real)).index_put((real.nonzero().squeeze(1),), of_row))
    return torch.stack(rows)


def naive_block_response(
    logits,
    prompt,
    size,
    shift=0,
    *,
    max_new_tokens,
    steps=None,
    part=None,
    threshold=1.0,
    ends=(0,),
    pad=0,
    sure=lambda log_probs, token: log_probs[token].item(),
    forbidden=(),
    ends_last=False,
):
    """Block by block, without a cache: each step runs everything up to the end of the present block."""
    mask, steps, part = 2, steps or max_new_tokens, part or size
    tokens, total = list(prompt), len(prompt) + max_new_tokens
    counts = [part * steps // max_new_tokens or 1]
    counts = [part // counts[0] + (step < part % counts[0]) for step in range(counts[0])]
    for start in range(len(prompt) // size * size, total, size):
        end = min(start + size, total)
        tokens += [mask] * (end - len(tokens))
        whole = start >= len(prompt) and start > 0
        schedule = [(start, start + 1, [1])] * (shift == 1 and whole)
        schedule += [(first, min(first + part, end), counts) for first in range(start, end, part)]
        for first, last, amounts in schedule:
            for amount in amounts:
                hidden = [i for i in range(first, last) if tokens[i] == mask]
                if not hidden:
                    break
                numbers = torch.tensor(numbers_of(len(tokens), size))
                sees = numbers.unsqueeze(1) >= numbers
                with torch.no_grad():
                    found = logits(torch.tensor([tokens]), sees.unsqueeze(0))[0].clone()
                found[:, [mask, *forbidden]] = -torch.inf
                given = {i: found[max(i - shift, 0)].log_softmax(-1) for i in hidden}
                best = {i: log_probs.argmax().item() for i, log_probs in given.items()}
                ordered = sorted(hidden, key=lambda i: (ends_last and best[i] in ends, -sure(given[i], best[i])))
                for rank, i in enumerate(ordered):
                    if rank < amount or given[i][best[i]].exp() > threshold:
                        tokens[i] = best[i]
        if set(tokens[len(prompt) :]) & set(ends):
            break
    response = tokens[len(prompt) :]
    ended = [i for i, token in enumerate(response) if token in ends]
    response = response[: ended[0] + 1] if ended else response
    return response + [pad] * (max_new_tokens - len(response))
