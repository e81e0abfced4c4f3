"""A step's gradient, added up over micro-batches; and what each part of the loss gives to it."""

import itertools

import torch
from torch import Tensor


class Gradient:
    """Adds up a step's gradient in p.grad; every --parts-every steps each part's by itself first, for their
    norms and cosines.
    """

    def __init__(self, trainer):
        self.params = list(trainer.policy.trainable().values())
        self.apart = trainer.step % trainer.config.parts_every == 0
        self.parts, self.loss = {}, 0.0

    def add(self, loss: Tensor, **terms: Tensor):
        """A micro-batch's loss, linear in the `terms` it was made of, which are named as the parts. Without a
        graph it only counts.
        """
        self.loss += float(loss.detach())
        if not loss.requires_grad:
            return
        if not self.apart:
            loss.backward()
            return
        # loss = sum_k w_k L_k: its derivative by L_k is the weight w_k, and w_k grad L_k is what part k gives
        # to the step.
        weights = torch.autograd.grad(loss, list(terms.values()), retain_graph=True)
        wanted = [(name, weight) for name, weight in zip(terms, weights) if weight]
        for left, (name, weight) in zip(reversed(range(len(wanted))), wanted):
            found = torch.autograd.grad(terms[name], self.params, weight, retain_graph=left > 0)
            before = self.parts.get(name, [0.0] * len(found))
            self.parts[name] = [a + b for a, b in zip(before, found)]

    def finish(self) -> dict:
        """Norms and cosines of the parts, weights included: they sum to the step's gradient, before
        clipping.
        """
        norms, metrics = {}, {}
        for name, part in self.parts.items():
            for p, g in zip(self.params, part):
                p.grad = g.clone() if p.grad is None else p.grad.add_(g)
            norms[name] = float(torch.stack([g.square().sum() for g in part]).sum().sqrt())
            metrics[f"gradient/{name}"] = norms[name]
        for a, b in itertools.combinations(sorted(norms), 2):
            if norms[a] and norms[b]:
                dot = sum(float((x * y).sum()) for x, y in zip(self.parts[a], self.parts[b]))
                metrics[f"cosine/{a}_{b}"] = dot / (norms[a] * norms[b])
        return metrics
