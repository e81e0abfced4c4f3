"""The losses of baselines.py, value and gradient in fp64, against TRL, torchrl, plain loops and exact
enumeration.

TRL 1.12.0's losses are methods: they are called with a stub in place of `self`. Its PPO losses stand in the
middle of `PPOTrainer.train`; `trl_ppo` runs those very lines. Where TRL's convention is another one, the test
states both.
"""

import inspect
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import baselines as B
from losses import AGGREGATES, KL, explained_variance, kl_estimate, normaliser, whiten

LENGTHS = (5, 1, 3, 7, 2, 6, 4, 7)
N, T = len(LENGTHS), max(LENGTHS)
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]  # (N, T)


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch():
    """logps, old_logps, ref_logps (N, T), advantages (N,): ratios on both sides of the clip, both signs of
    A.
    """
    old = -rand(N, T, seed=1).abs()
    return old + rand(N, T, seed=2, scale=0.3), old, old + rand(N, T, seed=3, scale=0.4), rand(N, seed=4)


def value_and_grad(f, x):
    x = x.detach().clone().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y, x)[0]


def assert_same(f, g, x, **tolerance):
    """Two functions agree at x in value and in gradient."""
    for a, b in zip(value_and_grad(f, x), value_and_grad(g, x)):
        torch.testing.assert_close(a, b, **({"rtol": 1e-10, "atol": 1e-12} | tolerance))


# -------------------------------------------------------------------------------------------------- oracles


class Accelerator:
    num_processes, device = 1, "cpu"
    gather = gather_for_metrics = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction: x)


def trl_grpo(logps, old, ref, A, mask, loss_type, beta, biased_kl, metrics):
    trainer = pytest.importorskip("trl").GRPOTrainer
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        importance_sampling_level="token",
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.28,
        args=SimpleNamespace(use_bias_correction_kl=not biased_kl, delta=None),
        model=SimpleNamespace(training=False),
        max_completion_length=11,
        accelerator=Accelerator,
        _entropy_bonus_enabled=False,
        _metrics={"eval": metrics},
    )
    ids = torch.zeros(N, T, dtype=torch.long)
    return trainer._compute_loss(
        stub,
        None,
        {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": ids,
            "completion_mask": mask.double(),
            "advantages": A,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": mask.sum(),
        },
    )


def trl_dpo(logits, ids, mask, ref_chosen, ref_rejected, beta, loss_type="sigmoid", label_smoothing=0.0):
    trainer = pytest.importorskip("trl").DPOTrainer
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=Accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return trainer._compute_loss(stub, lambda **kw: SimpleNamespace(logits=logits), inputs, False)


def trl_ppo(first, last, **names):
    """Run TRL's lines from the one that starts with `first` to the one that starts with `last`; return all
    names.
    """
    pytest.importorskip("trl")
    from trl.experimental.ppo import ppo_trainer

    lines = inspect.getsource(ppo_trainer.PPOTrainer.train).splitlines()
    i = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    j = next(j for j in range(i, len(lines)) if lines[j].strip().startswith(last))
    exec(
        textwrap.dedent("\n".join(lines[i : j + 1])),
        {**vars(ppo_trainer), "micro_batch_inds": slice(None)},
        names,
    )
    return names


# ------------------------------------------------------------------------------------------------------ SFT


def test_sft_is_torchs_cross_entropy():
    """Over all target tokens, as torch's reduction="mean" with ignore_index; per_response as a loop over
    rows.
    """
    logits, ids = rand(N, T, 9), torch.randint(9, (N, T), generator=torch.Generator().manual_seed(5))

    def logps(z):
        return z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    def rows(z):
        return sum(F.cross_entropy(z[i, :n], ids[i, :n]) for i, n in enumerate(LENGTHS)) / N

    labels = ids.where(MASK, -100).flatten()
    assert_same(
        lambda z: B.sft_loss(logps(z), MASK), lambda z: F.cross_entropy(z.flatten(0, 1), labels), logits
    )
    assert_same(lambda z: B.sft_loss(logps(z), MASK, per_response=True), rows, logits)


# ------------------------------------------------------------------------------------------------------ DPO


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1, 0.5))
def test_dpo_matches_trl(label_smoothing):
    """TRL's "sigmoid" loss has no label smoothing; its "aot" has, and on a batch of one pair is conservative
    DPO.
    """
    ids = torch.randint(9, (2 * N, T + 1), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([MASK, MASK.flip(0)])  # (2N, T), chosen then rejected
    logits, ref = rand(2 * N, T + 1, 9), -rand(2, N, seed=6).abs() * 5

    def ours(z):
        logps = z[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return B.dpo_loss(*(logps * mask).sum(1).chunk(2), *ref, beta=0.3, label_smoothing=label_smoothing)[0]

    def theirs(z):
        full = torch.cat([torch.zeros(2 * N, 1, dtype=torch.bool), mask], 1)
        if label_smoothing == 0:
            return trl_dpo(z, ids, full, *ref, beta=0.3)
        pairs = ([i, i + N] for i in range(N))
        return (
            sum(
                trl_dpo(z[p], ids[p], full[p], ref[0, p[:1]], ref[1, p[:1]], 0.3, "aot", label_smoothing)
                for p in pairs
            )
            / N
        )

    assert_same(ours, theirs, logits)


def test_dpo_smoothing_does_something_where_trl_ignores_it():
    """Smoothing moves the optimum from infinity to a reward margin of log((1 - eps) / eps)."""
    margin, zero = torch.tensor([math.log(9)], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    plain = value_and_grad(lambda x: B.dpo_loss(x, zero, zero, zero, beta=1.0)[0], margin)
    smooth = value_and_grad(
        lambda x: B.dpo_loss(x, zero, zero, zero, beta=1.0, label_smoothing=0.1)[0], margin
    )
    assert smooth[0] > plain[0] and plain[1] < -0.05 and smooth[1].abs() < 1e-12
    ids = torch.zeros(2, 2, dtype=torch.long)
    trl = [
        trl_dpo(rand(2, 2, 9), ids, torch.ones_like(ids), zero, zero, 1.0, label_smoothing=e)
        for e in (0.0, 0.1)
    ]
    assert trl[0] == trl[1]


def test_dpo_rewards():
    c, r, ref_c, ref_r = rand(4, 5)
    c.requires_grad_()
    _, chosen, rejected = B.dpo_loss(c, r, ref_c, ref_r, beta=0.3)
    torch.testing.assert_close(chosen, 0.3 * (c - ref_c).detach())
    torch.testing.assert_close(rejected, 0.3 * (r - ref_r))
    assert not chosen.requires_grad and not rejected.requires_grad


# ----------------------------------------------------------------------------------------------------- GRPO


@pytest.mark.parametrize("kl, beta", [("k3", 0.0), ("k3", 0.3), ("k3_ratio", 0.3)])
@pytest.mark.parametrize(
    "aggregate, theirs", [("sequence", "grpo"), ("token", "dapo"), ("constant", "dr_grpo")]
)
def test_grpo_matches_trl(aggregate, theirs, kl, beta):
    logps, old, ref, A = batch()
    metrics, settings = defaultdict(list), {"clip_high": 0.28, "kl_coef": beta, "kl": kl, "max_length": 11}
    mask = MASK.clone()
    mask[2] = False  # a completion masked as a whole still counts as a row, here as in TRL
    assert_same(
        lambda x: B.grpo_loss(x, old, ref, A, mask, aggregate=aggregate, **settings)[0],
        lambda x: trl_grpo(x, old, ref, A, mask, theirs, beta, kl == "k3", metrics),
        logps,
    )
    parts = B.grpo_loss(logps, old, ref, A, mask, aggregate=aggregate, **settings)[1]
    assert parts["clip_fraction_low"].item() == pytest.approx(metrics["clip_ratio/low_mean"][0])
    assert parts["clip_fraction_high"].item() == pytest.approx(metrics["clip_ratio/high_mean"][0])
    assert parts["clip_fraction_low"] > 0 and parts["clip_fraction_high"] > 0
    if beta:
        assert parts["kl"].item() == pytest.approx(metrics["kl"][0])


@pytest.mark.parametrize("kl", ("k1", "k3", "k3_ratio"))
@pytest.mark.parametrize("aggregate", ("sequence", "token", "constant"))
def test_grpo_matches_a_loop(aggregate, kl):
    logps, old, ref, A = batch()

    def loop(x):
        total = 0
        for i, n in enumerate(LENGTHS):
            for t in range(n):
                ratio = (x[i, t] - old[i, t]).exp()
                bound = min(ratio, ratio.new_tensor(1.28)) if A[i] > 0 else max(ratio, ratio.new_tensor(0.8))
                log_r = ref[i, t] - x[i, t]
                k = {
                    "k1": -log_r,
                    "k3": log_r.exp() - 1 - log_r,
                    "k3_ratio": ratio * (log_r.exp() - 1 - log_r),
                }[kl]
                weight = {"sequence": 1 / (n * N), "token": 1 / sum(LENGTHS), "constant": 1 / (N * T)}[
                    aggregate
                ]
                total = total - weight * (bound * A[i] - 0.3 * k)
        return total

    assert_same(lambda x: B.grpo_loss(x, old, ref, A, MASK, 0.2, 0.28, 0.3, kl, aggregate)[0], loop, logps)


def objectives(A, ratio, low=0.2, high=0.2):
    """GRPO's and PPO's loss of one token, and their gradients by the ratio."""

    def grpo(x):
        return B.grpo_loss(
            x.log()[None, None], torch.zeros(1, 1), None, torch.tensor([A]), torch.ones(1, 1), low, high
        )

    def ppo(x):
        return B.ppo_policy_loss(
            x.log()[None, None], torch.zeros(1, 1), torch.tensor([[A]]), torch.ones(1, 1), low
        )

    x = torch.tensor(ratio, dtype=torch.float64)
    losses = (grpo, ppo) if low == high else (grpo,)
    return [(*map(float, value_and_grad(lambda x, f=f: f(x)[0], x)), f(x)[1]) for f in losses]


@pytest.mark.parametrize(
    "A, ratio, loss, grad, bound",
    [  # PPO's eq. (7): the clip binds in two of the six cells
        (+2.0, 0.5, -1.0, -2.0, None),
        (+2.0, 1.1, -2.2, -2.0, None),
        (+2.0, 1.5, -2.4, 0.0, "high"),
        (-2.0, 0.5, +1.6, 0.0, "low"),
        (-2.0, 1.1, +2.2, +2.0, None),
        (-2.0, 1.5, +3.0, +2.0, None),
        (0.0, 0.5, 0.0, 0.0, None),
        (0.0, 1.5, 0.0, 0.0, None),
    ],
)
def test_clip_cells(A, ratio, loss, grad, bound):
    """The classic bug, a clip inverted for A < 0: it stops where it should push and pushes where it should
    stop.
    """
    for value, gradient, parts in objectives(A, ratio):
        assert (value, gradient) == (pytest.approx(loss), pytest.approx(grad))
        assert (parts["clip_fraction_low"], parts["clip_fraction_high"]) == (bound == "low", bound == "high")


def test_clip_bounds_are_separate():
    (low,), (high,) = objectives(-1.0, 0.5, low=0.1, high=0.4), objectives(1.0, 2.0, low=0.1, high=0.4)
    assert low[0] == pytest.approx(0.9) and high[0] == pytest.approx(-1.4)


def test_on_policy_the_loss_is_zero_and_the_gradient_is_not():
    """ "Loss 0.0000, is it broken?" Advantages sum to 0 in a group; the gradient is REINFORCE's."""
    logps, A = batch()[0], B.grpo_advantages(rand(2, 4)).flatten()
    loss, grad = value_and_grad(lambda x: B.grpo_loss(x, None, None, A, MASK)[0], logps)
    parts = B.grpo_loss(logps, None, None, A, MASK)[1]
    assert abs(loss) < 1e-12 and grad.abs().max() > 0.01
    torch.testing.assert_close(grad, -A[:, None] / MASK.sum(1, keepdim=True) / N * MASK)
    assert parts["ratio_mean"] == parts["ratio_max"] == 1 and parts["approx_kl"] == 0 and "kl" not in parts


def test_approximate_kl_is_a_masked_mean():
    logps, old, _, A = batch()
    parts = B.grpo_loss(logps, old, None, A, MASK)[1]
    log_ratio = (logps - old)[MASK]
    torch.testing.assert_close(parts["approx_kl"], (log_ratio.exp() - 1 - log_ratio).mean())
    torch.testing.assert_close(parts["ratio_max"], log_ratio.exp().max())
    assert parts["tokens"] == sum(LENGTHS) and not any(p.requires_grad for p in parts.values())


def test_advantages_and_trls():
    """Ours: over G, + 1e-6. TRL's: over G - 1, + 1e-4. Both by group: a prompt that pays more shifts nobody
    else's.
    """
    rewards = rand(3, 8) + torch.tensor([0.0, 10.0, -5.0])[:, None]
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(B.grpo_advantages(rewards), centred / (std + 1e-6))
    torch.testing.assert_close(B.grpo_advantages(rewards, scale="none"), centred)
    pytest.importorskip("trl")
    from trl.trainer.utils import nanstd

    theirs = centred / (
        nanstd(rewards, dim=1, keepdim=True) + 1e-4
    )  # GRPOTrainer._generate_and_score_completions
    torch.testing.assert_close(B.grpo_advantages(rewards, ddof=1, eps=1e-4), theirs)


@pytest.mark.parametrize("scale", ("std", "none"))
@pytest.mark.parametrize("reward", (0.1, 0.7, 1 / 3, -1e6 / 7, 0.0))
def test_tied_rewards_have_advantage_exactly_zero(reward, scale):
    """Seven times 0.1 do not average to 0.1; the residue over its own std is a made-up advantage."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for G in (1, 3, 7, 8):
            A = B.grpo_advantages(torch.full((2, G), reward, dtype=dtype), scale, eps=0.0, ddof=G % 2)
            assert torch.equal(A, torch.zeros_like(A))


# ------------------------------------------------------------------------------------------------------ PPO


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.9, 0.0)])
def test_gae_matches_torchrl_and_trl(gamma, lam):
    rewards, values = rand(N, T, seed=1) * MASK, rand(N, T, seed=2) * MASK
    ours = B.gae(rewards, values, MASK, gamma, lam)
    names = trl_ppo(
        "lastgaelam = 0",
        "returns = advantages",
        rewards=rewards,
        values=values,
        responses=rewards,
        args=SimpleNamespace(gamma=gamma, lam=lam),
    )
    torch.testing.assert_close(ours, (names["advantages"] * MASK, names["returns"] * MASK))

    functional = pytest.importorskip("torchrl.objectives.value.functional")
    done = torch.zeros(N, T, dtype=torch.bool).scatter(1, torch.tensor(LENGTHS)[:, None] - 1, True)
    junk = torch.full((N, 1), 1e3, dtype=torch.float64)  # never read: every row ends before
    args = [values, torch.cat([values[:, 1:], junk], 1), rewards, done]
    # Not the vec_ version: it drops powers of gamma * lam below 1e-7 and fails where the product is 0.
    theirs = functional.generalized_advantage_estimate(gamma, lam, *(x[..., None] for x in args))
    # 1e-6: torchrl holds gamma and lam in the default dtype, fp32. (TRL above agrees to fp64.)
    torch.testing.assert_close(ours, tuple(x[..., 0] * MASK for x in theirs), rtol=1e-6, atol=1e-6)


def test_gae_steps_over_a_gap():
    """Masked positions are no steps: left padding and gaps give what the compacted row gives."""
    r, v = rand(1, 3, seed=1), rand(1, 3, seed=2)
    gappy = torch.tensor([[0, 1, 0, 0, 1, 1, 0]])
    spread = [
        torch.full((1, 7), torch.nan, dtype=torch.float64).masked_scatter(gappy.bool(), x) for x in (r, v)
    ]
    for a, b in zip(B.gae(r, v, torch.ones(1, 3), 0.9, 0.8), B.gae(*spread, gappy, 0.9, 0.8)):
        torch.testing.assert_close(a[0], b[gappy.bool()])


def test_where_the_score_goes():
    """Ours on the EOS; TRL's one position later, in the padding, unless the row is full. The KL penalty is
    the same.
    """
    scores, (logps, _, ref, _) = rand(N, seed=5), batch()
    kl = torch.where(MASK, -0.1 * (logps - ref), 0)
    ours, theirs = kl.clone(), kl.clone()
    for i, n in enumerate(LENGTHS):
        ours[i, n - 1] += scores[i]
        theirs[i, min(n, T - 1)] += scores[i]
    torch.testing.assert_close(B.token_rewards(scores, logps, ref, MASK, 0.1), ours)
    assert torch.equal(
        B.token_rewards(scores, logps, None, MASK, 0.0), B.token_rewards(scores, logps, ref, MASK, 0.0)
    )
    lengths = torch.tensor(LENGTHS) - 1
    names = trl_ppo(
        "logr = ",
        "rewards[actual_start",
        ref_logprobs=ref.where(MASK, 1),
        logprobs=logps.where(MASK, 1),
        args=SimpleNamespace(kl_estimator="k1", kl_coef=0.1),
        sequence_lengths=lengths,
        sequence_lengths_p1=lengths + 1,
        scores=scores,
    )
    torch.testing.assert_close(names["rewards"], theirs)


def test_whiten():
    """Ours divides by the population's std, TRL's by n - 1."""
    x = rand(N, T) * 3 + 5
    w = whiten(x, MASK)[MASK]
    assert abs(w.mean()) < 1e-12 and w.std(correction=0).item() == pytest.approx(1)
    assert torch.equal(whiten(torch.full((1, 7), 0.1), torch.ones(1, 7)), torch.zeros(1, 7))
    pytest.importorskip("trl")
    from trl.experimental.ppo.ppo_trainer import masked_whiten

    torch.testing.assert_close(whiten(x, MASK, ddof=1), masked_whiten(x, MASK) * MASK)


def test_ppo_losses_match_trl():
    logps, old, _, _ = batch()
    A, values, old_values, returns = (rand(N, T, seed=s) * MASK for s in (11, 12, 13, 14))

    def theirs(new_logprobs=logps, vpred=values):
        return trl_ppo(
            "vpredclipped = ",
            "pg_loss = ",
            vpred=vpred,
            mb_values=old_values,
            mb_return=returns,
            mb_advantage=A,
            mb_logprobs=old * MASK,
            new_logprobs=new_logprobs * MASK,
            padding_mask=~MASK,
            padding_mask_p1=~MASK,
            args=SimpleNamespace(cliprange=0.2, cliprange_value=0.3),
        )

    assert_same(lambda x: B.ppo_policy_loss(x, old, A, MASK, 0.2)[0], lambda x: theirs(x)["pg_loss"], logps)
    assert_same(
        lambda x: B.ppo_value_loss(x, old_values, returns, MASK, 0.3)[0],
        lambda x: theirs(vpred=x)["vf_loss"],
        values,
    )
    fraction = B.ppo_value_loss(values, old_values, returns, MASK, 0.3)[1]["clip_fraction"]
    assert 0 < fraction.item() == pytest.approx(theirs()["vf_clipfrac"].item())
    torch.testing.assert_close(
        B.ppo_value_loss(values, old_values, returns, MASK, math.inf)[0],
        F.mse_loss(values[MASK], returns[MASK]) / 2,
    )


def test_explained_variance():
    returns = rand(N, T)
    noise = torch.where(MASK, rand(N, T, seed=1), torch.nan)
    expected = 1 - noise[MASK].var(correction=0) / returns[MASK].var(correction=0)
    torch.testing.assert_close(explained_variance(returns + noise, returns, MASK), expected)
    assert explained_variance(returns, returns, MASK) == 1
    assert explained_variance(returns, torch.full_like(returns, 0.1), MASK) == 0


# ------------------------------------------------------------------------------------------------ masks and
# normalisers


def losses():
    """name -> (loss(x, rows, width, denominator), denominator of the step); x is differentiated (N, T)."""
    _, old, ref, A = batch()
    table = {}
    for per_response in (False, True):
        table[f"sft {per_response}"] = (
            lambda x, s, w, n, p=per_response: B.sft_loss(x[s, :w], MASK[s, :w], p, denominator=n),
            normaliser(MASK, "sequence" if per_response else "token"),
        )
    for aggregate in ("sequence", "token", "constant"):
        table[f"grpo {aggregate}"] = (
            lambda x, s, w, n, a=aggregate: B.grpo_loss(
                x[s, :w],
                old[s, :w],
                ref[s, :w],
                A[s],
                MASK[s, :w],
                kl_coef=0.1,
                aggregate=a,
                max_length=T,
                denominator=n,
            )[0],
            normaliser(MASK, aggregate, max_length=T),
        )
    A2 = rand(N, T, seed=9)
    for name, loss in (("ppo policy", B.ppo_policy_loss), ("ppo value", B.ppo_value_loss)):
        table[name] = (
            lambda x, s, w, n, f=loss: f(x[s, :w], old[s, :w], A2[s, :w], MASK[s, :w], 0.2, denominator=n)[0],
            normaliser(MASK),
        )
    table["dpo"] = (lambda x, s, w, n: B.dpo_loss(x[s, 0], *rand(3, N)[:, s], denominator=n)[0], N)
    return table


@pytest.mark.parametrize("name", losses())
def test_micro_batches_do_not_change_the_gradient(name):
    """1 x 8 and 8 x 1, each row cut to its own length. Averaging micro-batch means would weight short answers
    more.
    """
    loss, n = losses()[name]
    x = batch()[0]

    def split(x, denominator):
        return sum(loss(x, slice(i, i + 1), LENGTHS[i], denominator) for i in range(N))

    assert_same(lambda x: loss(x, slice(None), T, n), lambda x: split(x, n), x)
    assert_same(
        lambda x: loss(x, slice(None), T, n), lambda x: loss(x, slice(None), T, None), x
    )  # the default count
    if name in (
        "sft False",
        "grpo token",
        "ppo policy",
        "ppo value",
    ):  # the bug this guards against is visible here
        assert not torch.allclose(split(x, None) / N, loss(x, slice(None), T, None))


def test_groups_are_rows():
    """(B, G, T) is (N, T) to every loss: flattened by hand, a reader lost track of which row was whose."""
    logps, old, ref, A = batch()
    rewards, returns = B.token_rewards(A, logps, ref, MASK, 0.1), rand(N, T, seed=9)

    def every(view):
        x, o, r, m = view(logps), view(old), view(ref), view(MASK)
        a, R = view(A), view(returns)
        return [
            B.sft_loss(x, m),
            B.sft_loss(x, m, per_response=True),
            *(B.grpo_loss(x, o, r, a, m, kl_coef=0.1, aggregate=how)[0] for how in AGGREGATES),
            B.ppo_policy_loss(x, o, R, m)[0],
            B.ppo_value_loss(x, o, R, m)[0],
            B.token_rewards(a, x, r, m, 0.1).flatten(),
            *(found.flatten() for found in B.gae(view(rewards), x, m)),
            whiten(R, m).flatten(),
        ]

    for rows, groups in zip(every(lambda x: x), every(lambda x: x.unflatten(0, (2, N // 2)))):
        torch.testing.assert_close(rows, groups)


def everything(x, mask, junk):
    """Every masked loss and estimate at once, with `junk` in the padding of all inputs."""

    def put(y):
        return y if junk is None else torch.where(mask, y, junk)

    logps, old, ref = put(x), put(batch()[1]), put(batch()[2])
    A = put(rand(N, T, seed=9))
    out = [B.sft_loss(logps, mask), B.sft_loss(logps, mask, per_response=True)]
    parts = []
    for aggregate in ("sequence", "token", "constant"):
        for kl in ("k1", "k3", "k3_ratio"):
            loss, p = B.grpo_loss(logps, old, ref, batch()[3], mask, kl_coef=0.1, kl=kl, aggregate=aggregate)
            out, parts = [*out, loss], [*parts, *p.values()]
    for f in (B.ppo_policy_loss, B.ppo_value_loss):
        loss, p = f(logps, old, A, mask)
        out, parts = [*out, loss], [*parts, *p.values()]
    r = B.token_rewards(rand(N, seed=5), logps, ref, mask, 0.1)
    parts += [whiten(A, mask), r, *B.gae(r, old, mask), explained_variance(old, A, mask)]
    return sum(out), parts


@pytest.mark.parametrize("junk", (math.nan, math.inf, -math.inf, 1e30))
def test_padding_reaches_neither_value_nor_gradient(junk):
    x = batch()[0]
    assert_same(
        lambda x: everything(x, MASK, None)[0], lambda x: everything(x, MASK, junk)[0], x, rtol=0, atol=0
    )
    assert (value_and_grad(lambda x: everything(x, MASK, None)[0], x)[1][~MASK] == 0).all()
    for a, b in zip(everything(x, MASK, None)[1], everything(x, MASK, junk)[1]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("junk", (None, math.nan))
def test_all_masked_is_a_zero_that_can_be_differentiated(junk):
    """Every completion truncated and masked: the step does nothing, and is not NaN."""
    nothing = torch.zeros_like(MASK)
    loss, grad = value_and_grad(lambda x: everything(x, nothing, junk)[0], batch()[0])
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))
    assert all((p == 0).all() for p in everything(batch()[0], nothing, junk)[1])


@pytest.mark.parametrize("mask_type", (torch.bool, torch.long, torch.float32))
def test_reductions_accumulate_in_fp32_at_least(mask_type):
    """4096 bf16 ones sum to 256 in bf16."""
    x, mask = torch.full((1, 4096), -1.0, dtype=torch.bfloat16), torch.ones(1, 4096, dtype=mask_type)
    loss = B.sft_loss(x, mask, denominator=1)
    assert loss == 4096 and loss.dtype == torch.float32
    assert B.sft_loss(x.double(), mask).dtype == torch.float64
    assert B.ppo_value_loss(x, x, -x, mask, denominator=1)[0] == 2 * 4096


# ------------------------------------------------------------------------------------------------------ bad
# input


def test_the_flags_offer_what_the_losses_take():
    """The flags are read before torch is there, so their choices stand a second time, above its import."""
    assert B.KL == KL and B.GRPOConfig.__dataclass_fields__["aggregate"].metadata["choices"] == AGGREGATES


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, m: B.grpo_loss(x, x, x, x[:, 0], m, kl="k2"), "kl must be one of"),
        (lambda x, m: B.grpo_loss(x, x, x, x[:, 0], m, aggregate="mean"), "aggregate must be one of"),
        (lambda x, m: B.grpo_loss(x, x, x, x[:, 0], m, clip_low=-0.1), "clip_low must not be negative"),
        (lambda x, m: B.grpo_loss(x, x, None, x[:, 0], m, kl_coef=0.1), "ref_logps is None"),
        (lambda x, m: B.grpo_loss(x, x, x, x, m), r"advantages is \(8, 7\)"),
        (lambda x, m: B.grpo_loss(x, x[:, 1:], x, x[:, 0], m), r"old_logps is \(8, 6\)"),
        (
            lambda x, m: B.grpo_loss(x, x, x, x[:, 0], m, aggregate="constant", max_length=0),
            "max_length must be",
        ),
        (lambda x, m: B.ppo_policy_loss(x, x, x, m, clip=-1), "clip must not be negative"),
        (lambda x, m: B.ppo_value_loss(x, x, x[:1], m), r"returns is \(1, 7\)"),
        (lambda x, m: B.token_rewards(x, x, x, m, 0.1), r"scores is \(8, 7\)"),
        (lambda x, m: B.sft_loss(x, m[0]), r"mask must be \(N, T\)"),
        (lambda x, m: B.gae(x, x[:, :3], m), r"values is \(8, 3\)"),
        (lambda x, m: B.dpo_loss(x, x, x, x), r"four \(N,\)"),
        (lambda x, m: B.dpo_loss(*x[:4], label_smoothing=0.6), "label_smoothing"),
        (lambda x, m: B.dpo_loss(*x[:4], beta=0), "beta > 0"),
        (lambda x, m: B.grpo_advantages(x, scale="batch"), "scale must be one of"),
        (lambda x, m: B.grpo_advantages(x / 0), "NaN or infinity"),
        (lambda x, m: kl_estimate(x, x[:1]), "ref_logps is"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(rand(N, T), MASK)
    assert "\n" not in str(error.value)
