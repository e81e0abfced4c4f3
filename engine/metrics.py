"""Every logged number, defined once: name -> (unit, meaning and what a healthy curve looks like)."""

METRICS = {
    "step": ("steps", "optimisation steps taken"),
    "reward/mean": (
        "reward",
        "mean over the step's samples; rises, noisily, because each step has other prompts",
    ),
    "reward/std": ("reward", "standard deviation over the samples; falls when all succeed or all fail"),
    "reward/q25": ("reward", "lower quartile of the samples' rewards"),
    "reward/median": ("reward", "median of the samples' rewards"),
    "reward/q75": ("reward", "upper quartile of the samples' rewards"),
    "reward/expert": ("reward", "mean reward of the step's expert answers: flat, the line to cross"),
    "groups/no_signal": (
        "share",
        "groups whose samples all earn the same; near 1 nothing is left to compare",
    ),
    "length/min": ("tokens", "shortest sample"),
    "length/mean": ("tokens", "mean sample length; a steady drift without reward is a length hack"),
    "length/max": ("tokens", "longest sample; at max_new_tokens samples are cut"),
    "length/truncated": ("share", "samples cut at max_new_tokens; should fall"),
    "kl/k1": (
        "nats/token",
        "mean of log pi - log pi_ref over sampled tokens; unbiased for KL(pi || ref), can be negative on "
        "a batch",
    ),
    "kl/k3": (
        "nats/token",
        "mean of exp(-d) - 1 + d, d = log pi - log pi_ref; never negative, 0 at the first step, then "
        "grows slowly",
    ),
    "entropy": (
        "nats/token",
        "of the policy's next-token distribution at sampled tokens; falls, but not to 0 at once",
    ),
    "mismatch/mean": (
        "nats/token",
        "mean |log-prob when sampled - when scored|: the price of another precision; well under 0.1",
    ),
    "mismatch/max": ("nats/token", "its largest value in the step"),
    "ratio/max": ("-", "largest pi / pi_old of the step; exactly 1 with one update for each rollout"),
    "clip/low": (
        "share",
        "tokens with A < 0 whose ratio is below the clip range, so without gradient; 0 with one update, "
        "else under 0.2",
    ),
    "clip/high": ("share", "tokens with A > 0 whose ratio is above it; likewise"),
    "kl/update": (
        "nats/token",
        "KL(pi_old || pi) of the step's updates, estimated by k3; 0 with one update, else well under 0.1",
    ),
    "updates": ("updates", "optimiser updates so far, where a step may take several on one rollout"),
    "loss": ("nats", "the method's loss; its size says little, see the method"),
    "grad_norm": ("-", "norm of the gradient before clipping; steady, spikes are rare"),
    "lr": ("-", "learning rate of the step"),
    "tokens/generated": ("tokens", "sampled so far in the run"),
    "tokens/per_second": ("tokens/s", "sampling speed in the step's rollout"),
    "time/rollout": ("s", "the step's sampling and rewards"),
    "time/update": ("s", "the step's scoring, backward pass and optimiser"),
    "memory/peak": ("GiB", "peak so far: of the GPU's allocator, or of the process on a CPU"),
    "eval/reward": ("reward", "mean over held-out prompts, one sample each; the number to watch"),
    "eval/low": ("reward", "lower end of its 95 % bootstrap interval over prompts; from 30 prompts on"),
    "eval/high": ("reward", "upper end"),
    "eval/std": ("reward", "standard deviation over the held-out prompts"),
    "eval/q25": ("reward", "lower quartile over them"),
    "eval/median": ("reward", "median"),
    "eval/q75": ("reward", "upper quartile"),
    "eval/expert": ("reward", "mean reward of the held-out expert answers"),
    "eval/kl": (
        "nats/answer",
        "KL(pi || ref) of whole answers to held-out prompts: mean of log pi - log pi_ref of the samples; "
        "0 at the start",
    ),
    "eval/logp_expert": (
        "nats/token",
        "mean J_imit of the held-out expert answers, at the sampling temperature; rises while the policy "
        "imitates",
    ),
}

# What logs of earlier versions call them. y is the expert answer throughout; "reference" is the frozen
# model alone.
RENAMED = {
    "reward/reference": "reward/expert",
    "logp/reference": "logp/expert",
    "advantage/reference": "advantage/expert",
    "eval/reference": "eval/expert",
    "eval/logp_reference": "eval/logp_expert",
    # samples.jsonl
    "reference": "expert",
    "reference_reward": "expert_reward",
    "reference_tokens": "expert_tokens",
    "logp_reference": "logp_expert",
    "judge_reference_reward": "judge_expert_reward",
}


def renamed(line):
    """A line of metrics.jsonl or samples.jsonl (a dict, or a list of them) by today's names, whenever it
    was written.
    """
    if isinstance(line, list) and line and isinstance(line[0], dict):
        return [renamed(item) for item in line]
    if not isinstance(line, dict):
        return line
    return {RENAMED.get(name, name): renamed(value) for name, value in line.items()}
