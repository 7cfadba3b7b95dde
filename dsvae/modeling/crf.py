"""The tags of the words of a sentence: a linear head and a conditional random field."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsvae.modeling.posterior import Float32Linear

IGNORE = -100
"""Label of the positions without one: padding, or not the first piece of a word."""


class CRF(nn.Module):
    """p(t|x) of the tags t_1..t_n of the n words of a sentence:

        score(t) = start[t_1] + sum_j emission_j[t_j] + sum_j transition[t_j, t_j+1] + end[t_n]
        p(t|x)   = exp score(t) / sum over all K^n tag sequences of exp score

    (Lafferty et al. 2001). Everything is computed in float32, whatever the dtype of the
    weights, the emissions or the autocast. The scores begin at 0, where each word's tag is
    a softmax of its own emissions.

    Both `nll` and `decode` go through `forward`: at ZeRO 3 the weights are there only
    while the module itself is called.

    Args:
        tags: the K names in IOB2 (`O`, `B-type`, `I-type`). Only an `I-` name restricts
            anything, and that only in `decode`, so that plain names work too.
    """

    def __init__(self, tags: Sequence[str]) -> None:
        super().__init__()
        self.tags = tuple(tags)
        self.start = nn.Parameter(torch.zeros(len(tags)))
        self.transitions = nn.Parameter(torch.zeros(len(tags), len(tags)))
        """From the row's tag to the column's."""
        self.end = nn.Parameter(torch.zeros(len(tags)))
        if not any(_allowed(None, tag) for tag in tags):
            raise ValueError(f"no sentence can begin with any of the tags {', '.join(tags)}")

    def reset_parameters(self) -> None:
        """Sets all scores to 0."""
        for scores in (self.start, self.transitions, self.end):
            nn.init.zeros_(scores)

    def nll(self, emissions: Tensor, tags: Tensor) -> Tensor:
        """Returns -log p(t|x) of each sentence in nats, (B,) float32. A sentence
        without tags has 0 and no gradient.

        Args:
            emissions: (B, S, K), a score of each tag at each position.
            tags: (B, S), the tag of each word at its first piece, `IGNORE` elsewhere.
        """
        return self(emissions, tags, decode=False)

    def decode(self, emissions: Tensor, words: Tensor) -> Tensor:
        """Returns the most probable tags that are possible in IOB2, (B, S), `IGNORE`
        where there is no word (Viterbi 1967).

        `I-type` may follow only `B-type` or `I-type`, and no sentence begins with it.
        The probabilities themselves ignore this rule.

        Args:
            emissions: (B, S, K).
            words: (B, S), true at the first piece of each word.
        """
        return self(emissions, words, decode=True)

    def forward(self, emissions: Tensor, tags_or_words: Tensor, decode: bool) -> Tensor:
        with torch.autocast(emissions.device.type, enabled=False):
            scores = self.start.float(), self.transitions.float(), self.end.float()
            if decode:
                with torch.no_grad():
                    return self._decode(emissions, tags_or_words.bool(), *scores)
            return self._nll(emissions, tags_or_words, *scores)

    def _nll(
        self, emissions: Tensor, tags: Tensor, start: Tensor, transitions: Tensor, end: Tensor
    ) -> Tensor:
        emissions, places, words = _words_first(emissions, tags != IGNORE)
        # A tag that is masked below stands where there is no word.
        tags = tags.gather(1, places).masked_fill(~words, 0)  # (B, W)
        some, last = words[:, 0], _last(words)
        chosen = emissions.gather(2, tags[:, :, None])[:, :, 0]  # 0 where there is no word
        steps = transitions[tags[:, :-1], tags[:, 1:]].masked_fill(~words[:, 1:], 0.0)
        score = start[tags[:, 0]] + chosen.sum(1) + steps.sum(1)
        score = score + end[tags.gather(1, last)[:, 0]]
        forward = start + emissions[:, 0]  # (B, K)
        for j in range(1, words.shape[1]):
            longer = (forward[:, :, None] + transitions).logsumexp(1) + emissions[:, j]
            forward = torch.where(words[:, j, None], longer, forward)
        return ((forward + end).logsumexp(1) - score).masked_fill(~some, 0.0)

    def _decode(
        self, emissions: Tensor, mask: Tensor, start: Tensor, transitions: Tensor, end: Tensor
    ) -> Tensor:
        emissions, places, words = _words_first(emissions, mask)
        first = [_allowed(None, tag) for tag in self.tags]
        follows = [[_allowed(before, tag) for tag in self.tags] for before in self.tags]
        start = start.masked_fill(~torch.tensor(first, device=start.device), float("-inf"))
        transitions = transitions.masked_fill(
            ~torch.tensor(follows, device=start.device), float("-inf")
        )
        best = start + emissions[:, 0]
        stay = torch.arange(len(self.tags), device=best.device).expand_as(best)
        came_from = []
        for j in range(1, words.shape[1]):
            longer, before = (best[:, :, None] + transitions).max(1)
            best = torch.where(words[:, j, None], longer + emissions[:, j], best)
            came_from.append(torch.where(words[:, j, None], before, stay))
        tag = (best + end).argmax(1, keepdim=True)  # (B, 1)
        path = [tag]
        for before in reversed(came_from):
            tag = before.gather(1, tag)
            path.append(tag)
        found = torch.cat(path[::-1], dim=1).masked_fill(~words, IGNORE)  # (B, W)
        return torch.full_like(mask, IGNORE, dtype=torch.long).scatter(1, places, found)


class TagHead(nn.Module):
    """The emissions of K tags, (B, S, K) float32, from the encoder's states (B, S, d).

    `crf` makes nats or tags of them.

    Args:
        tags: the K names, in IOB2.
    """

    def __init__(self, d_model: int, tags: Sequence[str]) -> None:
        super().__init__()
        self.head = Float32Linear(d_model, len(tags))
        self.crf = CRF(tags)

    def forward(self, states: Tensor) -> Tensor:
        return self.head(states)


def _words_first(emissions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Puts the words of each sentence side by side, for at least the W of the longest
    one, and at least 1.

    Returns: their emissions (B, W, K), float32 and 0 where a sentence has fewer words;
        their places in the sentence (B, W); and where there is a word (B, W).
    """
    width = _width(mask)
    words, places = mask.to(torch.int8).sort(dim=1, descending=True, stable=True)
    words, places = words[:, :width].bool(), places[:, :width]
    own = emissions.gather(1, places[:, :, None].expand(-1, -1, emissions.shape[2]))
    return own.float().masked_fill(~words[:, :, None], 0.0), places, words


def _width(mask: Tensor) -> int:
    """Returns how many words to compute. On a GPU it is the number of pieces: to learn
    the number of words, the host would wait for the device in every pass."""
    return max(1, int(mask.sum(1).max())) if mask.device.type == "cpu" else mask.shape[1]


def _last(words: Tensor) -> Tensor:
    """Returns the index of each sentence's last word, (B, 1); 0 without words."""
    return (words.sum(1, keepdim=True) - 1).clamp(min=0)


def _allowed(before: str | None, tag: str) -> bool:
    """Returns whether IOB2 lets `tag` follow `before`; None is the start of the
    sentence."""
    return not tag.startswith("I-") or before in (f"B-{tag[2:]}", tag)
