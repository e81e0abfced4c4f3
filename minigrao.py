"""GRAO: Group Relative Alignment Optimization, arXiv 2508.07750, for one small GPU or none.

    python minigrao.py                                    # the embedded model without a GPU, Qwen3-0.6B in NF4 with one
    python minigrao.py --without imitation                # an ablation; --beta, --lam, --group: the paper's choices

Read `grao_loss` beside eq. (3), `group_advantages` beside eq. (4), then `update`, one optimisation step.

Deviations from the paper, and choices where it leaves one:
- The group of eq. (4). The formula averages over the G samples; the text puts y into the group. `--group with_reference` (default)
  takes mean and deviation over the G + 1 members, `samples` over the G samples. When all samples tie, "samples" has no scale, so all
  advantages of that prompt are 0 and nothing is learnt from it, reference included; "with_reference" still imitates a better y.
- sigma_r is the population standard deviation, with eps = 1e-6 beside it; a group whose rewards all tie has advantages of exactly 0.
- R(o, y) here is an absolute reward of o (a verifier, a reward model), and R(y, y) that of y. With `--reward pairwise:DIR` or `judge:MODEL`
  it is the paper's comparison with y, in {+1, 0, -1}, and R(y, y) = 0.
- The policy is a LoRA adapter on a frozen, possibly 4-bit backbone, so learning rates are 10 to 1000 times the paper's 1e-6.
- Samples are drawn at temperature 1, not 0.7, and batches are small; --temperature and --prompts-per-step set both.
"""

import sys
from dataclasses import dataclass

from engine.command_line import answer_early
from engine.settings import Config, Method, setting


@dataclass
class GraoConfig(Config):
    beta: float = setting(0.5, "weight of imitation, eq. (3)", low=0, high=100)
    lam: float = setting(0.6, "weight of the alignment regulariser (lambda), eq. (3)", low=0, high=100)
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

from train import Sums, main


def group_advantages(rewards, reference_rewards, group="with_reference", eps=1e-6):
    """Eq. (4): A_i = (R(o_i, y) - mu_r) / sigma_r, for the samples and for the reference.

    rewards (B, G) of o_1..o_G, reference_rewards (B,) of y -> A_o (B, G), A_y (B,), in the rewards' unit over their deviation.
    group: "samples" takes mu_r and sigma_r (population) over the G samples, "with_reference" over the G + 1 members. Where these rewards
    all tie, A is exactly 0, not a rounding residue over eps. ValueError for another `group` or mismatched shapes.
    """
    if group not in ("samples", "with_reference"):
        raise ValueError(f"group is 'samples' or 'with_reference', got {group!r}")
    if rewards.ndim != 2 or reference_rewards.shape != rewards.shape[:1]:
        raise ValueError(
            f"rewards (B, G) and reference_rewards (B,) wanted, got {tuple(rewards.shape)} and {tuple(reference_rewards.shape)}"
        )
    R = torch.cat([rewards, reference_rewards[:, None]], 1)  # (B, G + 1)
    R = R if R.is_floating_point() else R.float()
    members = R if group == "with_reference" else R[:, :-1]
    mu = members.mean(1, keepdim=True)
    sigma = members.std(1, correction=0, keepdim=True)
    tied = members.amax(1, keepdim=True) == members.amin(1, keepdim=True)
    A = torch.where(tied, 0.0, (R - mu) / (sigma + eps))  # eq. (4)
    return A[:, :-1], A[:, -1]


def grao_loss(logp_samples, logp_reference, adv_samples, adv_reference, beta, lam, without=None):
    """Eq. (3), negated and averaged over the B prompts.

    logp_samples (B, G): J_expl(o_i) = 1/|o_i| sum_t log pi(o_{i,t} | q, o_{i,<t}), nats per token; logp_reference (B,): J_imit(y), likewise.
    adv_samples (B, G), adv_reference (B,): eq. (4), without gradient. without: None, or the term to leave out.
    -> (scalar loss, {"exploration", "imitation", "regularizer"}: each term's share of J, detached; they sum to -loss).

    The regulariser adds no direction of its own. The A_o of a group sum to 0 with group="samples" and to -A_y with "with_reference", so

        J = (1 + lam) * 1/G sum_i A_o J_expl + beta * A_y J_imit                   with "samples"
        J = (1 + lam) * 1/G sum_i A_o J_expl + (beta + lam / G) * A_y J_imit       with "with_reference"

    exactly: it re-weights exploration against imitation, and the ablation without it compares two weightings.
    """
    if (
        adv_samples.shape != logp_samples.shape
        or not logp_reference.shape == adv_reference.shape == logp_samples.shape[:1]
    ):
        raise ValueError("logp_samples and adv_samples (B, G), logp_reference and adv_reference (B,) wanted")
    J_expl, J_imit = logp_samples, logp_reference[:, None]  # (B, G), (B, 1)
    A_o, A_y = adv_samples.detach(), adv_reference.detach()[:, None]
    terms = {
        "exploration": A_o * J_expl,  # eq. (3), first term
        "imitation": beta * A_y * J_imit,  # second term; the same for every i
        "regularizer": lam * A_o * (J_expl - J_imit),  # third term
    }
    J = {
        name: term.mean(1).mean() * (name != without) for name, term in terms.items()
    }  # 1/G sum_i, then over B
    return -sum(J.values()), {name: value.detach() for name, value in J.items()}


def update(trainer, records):
    """One optimisation step of GRAO on B records."""
    config, policy = trainer.config, trainer.policy
    batch = trainer.rollout(records)  # o_1..o_G ~ pi(. | q), R(o_i), R(y)
    A_o, A_y = group_advantages(batch.rewards, batch.reference_rewards, config.group)

    # The reference is scored as one more completion of its prompt, so a prompt is computed once for all G + 1.
    members = [[*samples, y] for samples, y in zip(batch.completions, batch.references)]
    B, sums = len(records), Sums()
    for part in trainer.micro_batches(batch.prompts, members):
        scored = policy.token_logps(batch.prompts[part], members[part], config.temperature)
        J = scored.sequence_mean()  # (b, G + 1)
        loss, terms = grao_loss(
            J[:, :-1], J[:, -1], A_o[part], A_y[part], config.beta, config.lam, config.without
        )
        (
            loss * len(J) / B
        ).backward()  # grao_loss averages over its own b prompts; the step's average is over B
        with torch.no_grad():
            # The same members again, y included: the same shapes, so KL is exactly 0 before the first step.
            reference = policy.token_logps(
                batch.prompts[part], members[part], config.temperature, role="reference"
            )
        sums.tokens(scored.samples(), reference.samples(), batch.sampled_logps[part])
        terms = {f"objective/{name}": value for name, value in terms.items()}
        for name, value in {
            "loss": loss,
            "logp/samples": J[:, :-1].mean(),
            "logp/reference": J[:, -1].mean(),
            **terms,
        }.items():
            sums.add(name, value.detach().expand(len(J)))

    metrics = batch.metrics | sums.means() | trainer.optimizer_step()
    sizes = {name: abs(metrics[f"objective/{name}"]) for name in ("exploration", "imitation", "regularizer")}
    metrics |= {f"share/{name}": size / (sum(sizes.values()) or 1.0) for name, size in sizes.items()}
    return metrics | {"advantage/max": float(A_o.abs().max()), "advantage/reference": float(A_y.mean())}


METRICS = {
    "objective/exploration": (
        "nats",
        "first term of eq. (3), mean over prompts; the three sum to -loss (the paper's Fig. 4 draws their total)",
    ),
    "objective/imitation": ("nats", "second term"),
    "objective/regularizer": ("nats", "third term"),
    "share/exploration": (
        "share",
        "|exploration| over the sum of the three |terms| of J (the paper's Fig. 5): grows as the policy passes y",
    ),
    "share/imitation": ("share", "likewise: large while y beats the samples, then falls"),
    "share/regularizer": ("share", "likewise"),
    "logp/samples": ("nats/token", "mean J_expl; rises as the policy sharpens"),
    "logp/reference": ("nats/token", "mean J_imit; rises while the policy imitates"),
    "advantage/max": ("-", "largest |A| among the samples; at most sqrt(G)"),
    "advantage/reference": (
        "-",
        "mean A_y: above 0 while y beats the policy, below 0 once the policy beats y",
    ),
}
PANELS = [
    ("Components of the objective", "share", ["share/exploration", "share/imitation", "share/regularizer"]),
    ("Log-likelihood", "nats/token", ["logp/samples", "logp/reference"]),
    ("Advantage of the reference", "-", ["advantage/reference"]),
    ("Loss", "nats", ["loss"]),
]
NEXT = "--without imitation (an ablation), --group samples (the other reading of eq. (4)), --seed 1, or a chat model with --model DIR"
GRAO = Method("grao", GraoConfig, update, METRICS, PANELS, next=NEXT)

if __name__ == "__main__":
    sys.exit(main(GRAO, description=__doc__))
