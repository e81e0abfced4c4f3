"""GRAO: Group Relative Alignment Optimization, arXiv 2508.07750, for one small GPU or none.

    python minigrao.py                       # the embedded model without a GPU, Qwen3-0.6B in NF4 with one
    python minigrao.py --without imitation   # an ablation; --beta, --lam, --group: the paper's choices

Read `grao_loss` beside eq. (3), `group_advantages` beside eq. (4), then `update`, one optimisation step.

Deviations from the paper, and choices where it leaves one:
- The group of eq. (4). The formula averages over the G samples; the text puts y into the group. `--group
  with_reference` (default) takes mean and deviation over the G + 1 members, `samples` over the G samples.
  When all samples tie, "samples" has no scale, so all advantages of that prompt are 0 and nothing is learnt
  from it, y included; "with_reference" still imitates a better y.
- sigma_r is the population standard deviation, with eps = 1e-6 beside it; a group whose rewards all tie has
  advantages of exactly 0.
- R(o, y) here is an absolute reward of o (a verifier, a reward model), and R(y, y) that of y. With `--reward
  pairwise:DIR` or `judge:MODEL` it is the paper's comparison with y, in {+1, 0, -1}, and R(y, y) = 0.
- The policy is a LoRA adapter on a frozen, possibly 4-bit backbone, so learning rates are 10 to 1000 times
  the paper's 1e-6.
- Samples are drawn at temperature 1, not 0.7, and batches are small; --temperature and --prompts-per-step set
  both.
"""

import sys
from dataclasses import dataclass

from engine.command_line import answer_early
from engine.settings import Config, Method, setting


@dataclass
class GraoConfig(Config):
    # beta is no strength of a reference here, as it is in DPO, and lam is no GAE lambda: the letters are
    # GRAO's.
    beta: float = setting(0.5, "weight of imitation, eq. (3)", low=0, high=100)
    lam: float = setting(0.6, "weight of the alignment regulariser (lambda), eq. (3)", low=0, high=100)
    # Reading (a), the formula's, or (b), the text's, of whose rewards a group's mean and deviation are.
    group: str = setting(
        "with_reference",
        "whose rewards eq. (4) averages: samples, or with_reference",
        choices=("samples", "with_reference"),
    )
    without: str = setting(
        None,
        "leave out a term of eq. (3): imitation, exploration or regularizer",
        choices=("imitation", "exploration", "regularizer"),
    )


if __name__ == "__main__":
    answer_early(GraoConfig, __doc__)  # --help and mistyped flags: the imports below take seconds

import torch
from torch import Tensor

from train import Sums, Trainer, main


def group_advantages(
    rewards: Tensor, reference_rewards: Tensor, group: str = "with_reference", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Eq. (4) of 2508.07750v1: A_i = (R(o_i, y) - mu_r) / sigma_r, for the samples o_1..o_G and for the
    expert answer y.

    rewards            (B, G)  R(o_i, y), in the reward's own unit
    reference_rewards  (B,)    R(y, y), likewise
    group              whose rewards mu_r and sigma_r describe: "samples", the G samples, or "with_reference",
                       the G + 1 members
    eps                beside sigma_r in the denominator
    -> A_o (B, G), A_y (B,), in deviations of the group. ValueError for another `group` or mismatched shapes.
    """
    if group not in ("samples", "with_reference"):
        raise ValueError(f"group is 'samples' or 'with_reference', got {group!r}")
    if rewards.ndim != 2 or reference_rewards.shape != rewards.shape[:1]:
        shapes = f"{tuple(rewards.shape)} and {tuple(reference_rewards.shape)}"
        raise ValueError(f"rewards (B, G) and reference_rewards (B,) wanted, got {shapes}")
    R = torch.cat([rewards, reference_rewards[:, None]], 1)  # (B, G + 1), y last
    R = R if R.is_floating_point() else R.float()  # a verifier may pay whole numbers

    # mu_r and sigma_r are each prompt's own. Over the batch, an easy prompt would make all of its answers
    # look good.
    members = R if group == "with_reference" else R[:, :-1]
    mu = members.mean(1, keepdim=True)  # (B, 1)
    sigma = members.std(
        1, correction=0, keepdim=True
    )  # the population's: the paper prints 1/G under the root
    # Tied rewards say nothing, so A = 0. Tested on the rewards: the mean of seven times 0.1 is not 0.1, and
    # that rounding residue over an equally small sigma would be an advantage of order 1.
    tied = members.amax(1, keepdim=True) == members.amin(1, keepdim=True)
    A = torch.where(tied, 0.0, (R - mu) / (sigma + eps))  # eq. (4), for all G + 1 by the same mu and sigma
    return A[:, :-1], A[:, -1]


def grao_loss(
    logp_samples: Tensor,
    logp_reference: Tensor,
    adv_samples: Tensor,
    adv_reference: Tensor,
    beta: float,
    lam: float,
    without: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (3) of 2508.07750v1, negated and averaged over the B prompts:

        J_GRAO = 1/G Σᵢ [ A_oᵢ J_expl(oᵢ)  +  β A_y J_imit(y)  +  λ A_oᵢ (J_expl(oᵢ) - J_imit(y)) ]
                          exploration         imitation           alignment regulariser

    logp_samples    (B, G)  J_expl(oᵢ) = 1/|oᵢ| Σₜ log π(oᵢₜ | q, oᵢ,<ₜ), nats per token
    logp_reference  (B,)    J_imit(y), likewise of the expert answer
    adv_samples     (B, G)  A_o of eq. (4); adv_reference (B,) A_y; both taken without gradient
    beta, lam       β and λ; without: None, or the term to leave out (an ablation of Table 3)
    -> (scalar loss, {"exploration", "imitation", "regularizer"}: each term's share of J, detached; they sum
    to -loss).
    ValueError for shapes that would broadcast into something else.

    The regulariser adds no direction of its own. The A_o of a group sum to 0 with group="samples" and to -A_y
    with "with_reference", so that J is exactly

        (1 + λ) 1/G Σᵢ A_oᵢ J_expl(oᵢ) + β         A_y J_imit(y)      with "samples"
        (1 + λ) 1/G Σᵢ A_oᵢ J_expl(oᵢ) + (β + λ/G) A_y J_imit(y)      with "with_reference"

    It re-weights exploration against imitation, and the ablation without it compares two weightings.
    """
    if (
        adv_samples.shape != logp_samples.shape
        or not logp_reference.shape == adv_reference.shape == logp_samples.shape[:1]
    ):
        raise ValueError("logp_samples and adv_samples (B, G), logp_reference and adv_reference (B,) wanted")
    J_expl, J_imit = logp_samples, logp_reference[:, None]  # (B, G), (B, 1): one y for all i
    # Advantages are weights, not something to climb: with gradient, a learnt reward would be maximised
    # through them.
    A_o, A_y = adv_samples.detach(), adv_reference.detach()[:, None]
    terms = {
        "exploration": A_o * J_expl,  # eq. (3), first term
        "imitation": beta * A_y * J_imit,  # second term; the same for every i
        "regularizer": lam * A_o * (J_expl - J_imit),  # third term
    }
    # No ratio pi / pi_old, no clip, no KL: eq. (3) has log-probabilities, and one update is made with each
    # set of samples, where the gradient of log pi and that of the ratio are the same.
    J = {}
    for name, term in terms.items():
        J[name] = term.mean(1).mean() * (name != without)  # 1/G sum_i, then the mean over B
    return -sum(J.values()), {name: value.detach() for name, value in J.items()}


def update(trainer: Trainer, records: list) -> dict:
    """One optimisation step of GRAO on B records -> {metric: float}."""
    c, sums = trainer.config, Sums()

    # 1. Explore: o_1..o_G ~ pi(. | q) for each prompt q, their rewards R(o_i, y), and R(y, y) of the expert's
    #    answer.
    batch = trainer.rollout(records)

    # 2. Compare: an answer is good if it is better than its group. While y beats the samples A_y > 0 and the
    #    step imitates it; once the policy has overtaken y, A_y < 0 and the same term pushes away from y.
    A_o, A_y = group_advantages(batch.rewards, batch.expert_rewards, c.group)  # (B, G), (B,)

    # 3. Learn, a micro-batch of whole prompt groups at a time. y is scored as one more completion of its
    #    prompt: the prompt is computed once for all G + 1, and J_imit is taken at the same temperature as
    #    J_expl, as their difference in the third term needs.
    for part in trainer.scored(batch, sums, with_expert=True):
        J = part.logps.sum(-1) / part.mask.sum(
            -1
        )  # (b, G + 1): 1/|o| sum_t log pi(o_t); logps is 0 on padding
        b, J_expl, J_imit = len(J), J[:, :-1], J[:, -1]
        A = A_o[part.groups], A_y[part.groups]
        loss, terms = grao_loss(J_expl, J_imit, *A, c.beta, c.lam, c.without)
        # grao_loss averages over its own b prompts and the step over B. Without b / B, prompts in small
        # micro-batches would weigh more, and the gradient would depend on how much memory there is.
        (loss * b / len(records)).backward()
        about = {"loss": loss, "logp/samples": J_expl.mean(), "logp/expert": J_imit.mean()}
        for name, value in (about | {f"objective/{name}": term for name, term in terms.items()}).items():
            sums.mean(name, value, b)

    # 4. Step: the gradient's norm is clipped, AdamW moves the adapter.
    metrics = batch.metrics | sums.means() | trainer.optimizer_step()
    metrics |= {"advantage/max": float(A_o.abs().max()), "advantage/expert": float(A_y.mean())}
    return metrics | shares(metrics)


def shares(metrics: dict) -> dict:
    """Each |term| of J over the sum of the three, the paper's Fig. 5; all 0 where no group has a signal."""
    # Shares of the values, not of the gradient: a term of value 0 may still pull.
    sizes = {}
    for name in ("exploration", "imitation", "regularizer"):
        sizes[name] = abs(metrics[f"objective/{name}"])
    total = sum(sizes.values()) or 1.0
    return {f"share/{name}": size / total for name, size in sizes.items()}


METRICS = {
    # The terms of eq. (3), means over prompts. They sum to -loss; the paper's Fig. 4 draws their total.
    "objective/exploration": ("nats", "first term of eq. (3), mean over prompts; the three sum to -loss"),
    "objective/imitation": ("nats", "second term"),
    "objective/regularizer": ("nats", "third term"),
    # The paper's Fig. 5, "imitate - explore - transcend": over 82 % imitation and regulariser at first, then
    # 52 to 61 % exploration.
    "share/exploration": ("share", "|exploration| over the sum of |terms|: grows as the policy passes y"),
    "share/imitation": ("share", "likewise: large while y beats the samples, then falls"),
    "share/regularizer": ("share", "likewise"),
    "logp/samples": ("nats/token", "mean J_expl; rises as the policy sharpens"),
    "logp/expert": ("nats/token", "mean J_imit; rises while the policy imitates"),
    "advantage/max": ("-", "largest |A| among the samples; at most sqrt(G)"),
    "advantage/expert": ("-", "mean A_y: above 0 while y beats the policy, below 0 once the policy beats y"),
}
PANELS = [
    ("Components of the objective", "share", ["share/exploration", "share/imitation", "share/regularizer"]),
    ("Log-likelihood", "nats/token", ["logp/samples", "logp/expert"]),
    ("Advantage of the expert answer", "-", ["advantage/expert"]),
    ("Loss", "nats", ["loss"]),
]
NEXT = (
    "--without imitation (an ablation), --group samples (the other reading of eq. (4)), --seed 1, "
    "or a chat model with --model DIR"
)
GRAO = Method("grao", GraoConfig, update, METRICS, PANELS, next=NEXT)

if __name__ == "__main__":
    sys.exit(main(GRAO, description=__doc__))
