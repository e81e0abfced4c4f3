"""Bradley-Terry: the loss of preference pairs, scores of many answers, and a role's training in steps that
can be interrupted.

    policy.add_role("reward")
    history = fit_scorer(policy, "reward", pairs, held_out, lr=1e-4, epochs=1)   # adapter and head, in place
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.errors import UserError
from engine.measures import accuracy
from engine.models import trim_memory


def bradley_terry_loss(chosen, rejected, margin=None):
    """-mean log sigmoid(chosen - rejected - margin): Bradley-Terry's negative log-likelihood -> scalar, nats.

    chosen, rejected: (N,) scores of the better and the worse answer of each pair, with gradient; margin:
    None, a number, or (N,), how far apart they should be (Llama 2, arXiv 2307.09288, eq. (2)). At least fp32;
    does not overflow. ValueError for other shapes, or no pair.
    """
    if (
        chosen.shape != rejected.shape
        or chosen.numel() == 0
        or (torch.is_tensor(margin) and margin.shape not in ((), chosen.shape))
    ):
        got = f"{tuple(chosen.shape)}, {tuple(rejected.shape)}"
        raise ValueError(f"chosen and rejected (N,) wanted, N > 0, and a margin of that shape; got {got}")
    d = (chosen - rejected).to(torch.promote_types(chosen.dtype, torch.float32))
    return -F.logsigmoid(d if margin is None else d - margin).mean()


def micro_batches(prompts, groups, most):
    """Groups (a prompt's ids with G answers' ids) of one size and like lengths -> lists of indices, each of
    at most `most` tokens or one group.
    """
    tokens = [len(p) + sum(map(len, group)) for p, group in zip(prompts, groups, strict=True)]
    batch = []
    for i in sorted(range(len(groups)), key=lambda i: (len(groups[i]), tokens[i])):
        if batch and (
            len(groups[i]) != len(groups[batch[0]]) or sum(tokens[j] for j in batch) + tokens[i] > most
        ):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def group_scores(policy, role, prompts, groups, most=4096):
    """A role's scores of each prompt's answers -> list of lists of floats. prompts: lists of ids; groups: for
    each a list of answers' ids.

    A prompt is computed once for all its answers; at most `most` tokens, or one group, at a time. UserError
    for a score that is not finite.
    """
    scores = [None] * len(groups)
    for part in micro_batches(prompts, groups, most):
        for i, row in zip(
            part, policy.sequence_scores([prompts[i] for i in part], [groups[i] for i in part], role).tolist()
        ):
            scores[i] = row
    if not all(math.isfinite(s) for row in scores for s in row):
        raise UserError(
            f"role {role}: gave a score that is not finite; its weights, or --dtype bfloat16, may be at fault"
        )
    return scores


# ------------------------------------------------------------------------------------------------------------
# Training


def fit_scorer(policy, role, pairs, held_out, *, log=None, folder=None, stop=None, **options):
    """Train a role of Policy.add_role (adapter and head) by Bradley-Terry, in place -> history.

    pairs, held_out: lists of (prompt_ids, better_ids, worse_ids) or (..., margin); answers end with their
    EOS. A pair is one group of two, its prompt computed once. options: the fields of Fit below. The history
    is a list of dicts, one for each evaluation; log(line) is called with each. The role ends with the
    parameters of its best evaluation, see Fit.best; without held_out pairs with the last ones. folder: where
    the state is kept at every evaluation, with save(fit), and at the start taken up again, with restore(fit).
    stop: an object whose `asked` becomes true when training is to be saved after the current batch and left;
    then None is returned. UserError for no pair or a loss that is not finite.
    """
    fit = Fit(policy, role, pairs, held_out, **options)
    if folder:
        folder.restore(fit)
    while not fit.finished:
        fit.take_step()
        evaluated = fit.due
        if evaluated:
            line = fit.evaluate()
            if log:
                log(line)
        asked = stop is not None and stop.asked
        if folder and (evaluated or asked):
            folder.save(fit)
        if asked and not fit.finished:
            return None
    fit.keep_best()
    policy.fitted[role] = fit.history  # a run that goes on with this role keeps it: Policy.save_fitted
    return fit.history


@dataclass
class Fit:
    """The training of one role: its settings, and the state that a step changes.

    Which pairs a step takes follows from the seed and the step's number alone, so training that was saved and
    taken up again is the training that never stopped.
    """

    policy: object
    role: str
    pairs: list  # to learn from
    held_out: list  # to stop by
    lr: float = 1e-4  # falls linearly to 0 after 5 % of warm-up
    epochs: int = 1
    batch_size: int = 16  # pairs
    margin: float = 0.0  # of pairs that name none
    # Of mean (chosen + rejected)^2, which keeps scores near 0 (Eisenstein et al., arXiv 2312.09244).
    centre: float = 0.0
    eval_every: int = 0  # batches; 0: eight evaluations in all
    patience: int = 0  # evaluations without a better one after which training stops; 0: never
    seed: int = 0  # decides the order of the pairs
    max_tokens_per_pass: int = 4096  # bounds memory and does not change the gradient
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if not self.pairs:
            raise UserError(f"role {self.role}: no pair to learn from")
        self.params = dict(self.policy.trainable(self.role))
        for name, p in self.policy.heads[self.role].named_parameters():
            self.params[f"{self.role}_head.{name}"] = p
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=self.lr, weight_decay=self.weight_decay)
        self.batches = math.ceil(len(self.pairs) / self.batch_size)  # in one epoch
        self.steps = self.epochs * self.batches
        self.eval_every = self.eval_every or math.ceil(self.steps / 8)
        self.step = 0
        self.losses = []  # of every pair since the last evaluation, nats
        self.history = []  # lines, one for each evaluation
        self.kept = {}  # step of an evaluation that is or may become the best -> its parameters
        self.seconds, self.started = 0.0, time.perf_counter()

    # -- a step ---------------------------------------------------------------------------------------------

    @property
    def finished(self):
        """Whether all steps are taken, or the patience is at its end."""
        if self.step == self.steps:
            return True
        if not (self.patience and self.held_out and self.history):
            return False
        better = [line["step"] for line in self.history].index(self.history[-1]["best_step"])
        return len(self.history) - 1 - better >= self.patience

    @property
    def due(self):
        """Whether the step that was just taken is to be evaluated."""
        return self.step % self.eval_every == 0 or self.step == self.steps

    def next_pairs(self):
        """The pairs of the next step: every epoch has a new seeded permutation of them."""
        epoch, batch = divmod(self.step, self.batches)
        generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
        order = torch.randperm(len(self.pairs), generator=generator).tolist()
        begin = batch * self.batch_size
        return [self.pairs[i] for i in order[begin : begin + self.batch_size]]

    def take_step(self):
        """One optimisation step."""
        batch = self.next_pairs()
        prompts, groups = [p[0] for p in batch], [[p[1], p[2]] for p in batch]
        for part in micro_batches(prompts, groups, self.max_tokens_per_pass):
            with self.policy.role(self.role):  # around the backward pass, too, for gradient checkpointing
                loss = self.loss([batch[i] for i in part])
                (loss * len(part) / len(batch)).backward()
            self.losses += [float(loss.detach())] * len(part)
        self.norm = float(torch.nn.utils.clip_grad_norm_(self.params.values(), self.max_grad_norm))
        if not math.isfinite(self.norm) or not math.isfinite(self.losses[-1]):
            raise UserError(
                f"role {self.role}: loss or gradient is not finite at batch {self.step + 1}; "
                "try a lower --lr or --dtype float32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        trim_memory(self.step)

    def loss(self, batch):
        """Of some pairs of one step: Bradley-Terry with their margins, and the centring term."""
        prompts, groups = [p[0] for p in batch], [[p[1], p[2]] for p in batch]
        scores = self.policy.sequence_scores(prompts, groups, self.role)  # (b, 2): better, worse
        margins = scores.new_tensor([p[3] if len(p) > 3 else self.margin for p in batch])
        centring = scores.sum(1).square().mean()
        return bradley_terry_loss(scores[:, 0], scores[:, 1], margins) + self.centre * centring

    def schedule(self):
        """Factor on the learning rate of the next step."""
        warmup = math.ceil(0.05 * self.steps)
        return min((self.step + 1) / warmup, (self.steps - self.step) / max(1, self.steps - warmup))

    # -- evaluation -----------------------------------------------------------------------------------------

    def evaluate(self):
        """Measure on the held-out pairs, keep the parameters if they may be the best -> the history's new
        line.
        """
        epoch, batch = divmod(self.step - 1, self.batches)
        line = {
            "step": self.step,
            "pairs": epoch * len(self.pairs) + min((batch + 1) * self.batch_size, len(self.pairs)),
            "train/loss": sum(self.losses) / len(self.losses),
            "grad_norm": self.norm,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.losses = []
        self.history.append(line)
        if self.held_out:
            line |= self.measure_held_out()
            self.keep_candidates()
            line["best_step"] = self.best()["step"]
        line["time"] = self.elapsed()
        return line

    def measure_held_out(self):
        prompts, groups = [p[0] for p in self.held_out], [[p[1], p[2]] for p in self.held_out]
        rows = group_scores(self.policy, self.role, prompts, groups, self.max_tokens_per_pass)
        scores = torch.tensor(rows)  # (N, 2): better, worse
        return {
            "held_out/accuracy": accuracy(scores[:, 0], scores[:, 1]),
            "held_out/loss": float(bradley_terry_loss(scores[:, 0], scores[:, 1])),
        }

    def best(self):
        """The line of the best evaluation so far: of those whose accuracy is within one standard error of the
        highest, the one of lowest loss, because a few hundred pairs cannot tell their accuracies apart."""
        highest = max(line["held_out/accuracy"] for line in self.history)
        near = highest - math.sqrt(highest * (1 - highest) / len(self.held_out))
        close = [line for line in self.history if line["held_out/accuracy"] >= near]
        return min(close, key=lambda line: (line["held_out/loss"], -line["held_out/accuracy"]))

    def keep_candidates(self):
        """Keep the parameters of evaluations that are the best or may become it.

        As the highest accuracy rises, one of low loss falls behind, and the best is then one that had been
        passed over. One that another surpasses in both can never be it.
        """
        self.kept[self.step] = {name: p.detach().clone() for name, p in self.params.items()}
        lines = {line["step"]: line for line in self.history}
        for step in list(self.kept):
            if any(surpasses(lines[other], lines[step]) for other in self.kept if other != step):
                del self.kept[step]

    def keep_best(self):
        """Give the role the parameters of its best evaluation."""
        if not self.held_out:
            return
        kept = self.kept[self.best()["step"]]
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(kept[name])

    def elapsed(self):
        return self.seconds + time.perf_counter() - self.started

    # -- state ----------------------------------------------------------------------------------------------

    def state(self):
        """Everything the next step depends on -> (tensors by name, numbers that JSON can hold)."""
        tensors = {}
        for name, p in self.params.items():
            tensors[f"param/{name}"] = p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}/{name}"] = value
            for step, kept in self.kept.items():
                tensors[f"kept/{step}/{name}"] = kept[name]
        tensors = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
        numbers = {"step": self.step, "losses": self.losses, "history": self.history}
        sizes = {"pairs": len(self.pairs), "held_out": len(self.held_out)}
        return tensors, numbers | sizes | {"seconds": self.elapsed()}

    def load_state(self, tensors, numbers):
        """Take up what `state` has given. ValueError or KeyError if it is not of this training."""
        if (numbers["pairs"], numbers["held_out"]) != (len(self.pairs), len(self.held_out)):
            raise ValueError(f"it is of {numbers['pairs']} pairs, and the data now has {len(self.pairs)}")
        self.step, self.losses = numbers["step"], numbers["losses"]
        self.history, self.seconds = numbers["history"], numbers["seconds"]
        steps = {int(name.split("/")[1]) for name in tensors if name.startswith("kept/")}
        self.kept = {step: {} for step in sorted(steps)}
        for name, p in self.params.items():
            with torch.no_grad():
                p.copy_(same_shape(tensors[f"param/{name}"], p))
            for step in self.kept:
                self.kept[step][name] = same_shape(tensors[f"kept/{step}/{name}"], p).to(p.device)
            self.optimizer.state[p] = {
                "step": tensors[f"step/{name}"],
                "exp_avg": same_shape(tensors[f"exp_avg/{name}"], p).to(p.device),
                "exp_avg_sq": same_shape(tensors[f"exp_avg_sq/{name}"], p).to(p.device),
            }


def surpasses(line, other):
    """Whether an evaluation is better than another, earlier or later, in whichever way they are compared.

    Of two that measure the same the earlier one stays, as in Fit.best.
    """
    here = line["held_out/accuracy"], -line["held_out/loss"]
    there = other["held_out/accuracy"], -other["held_out/loss"]
    if here == there:
        return line["step"] < other["step"]
    return here[0] >= there[0] and here[1] >= there[1]


def same_shape(tensor, p):
    """A copy_ of another shape would be broadcast without a word."""
    if tensor.shape != p.shape:
        raise ValueError(f"a tensor is {tuple(tensor.shape)}, wanted {tuple(p.shape)}")
    return tensor
