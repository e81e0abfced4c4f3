"""Log-probabilities, their gradient and their memory, against a full log_softmax and transformers' own
forward pass.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import END_OF_TURN, FAMILIES, dense_logps, random_ids, randomise_all
from torch.profiler import ProfilerActivity, profile

import policy as policy_module
from data import UserError
from engine import scoring
from engine.scoring import ChunkedLogProb, Pack, plain_token_logps
from policy import Policy

# ------------------------------------------------------------------------------------------------------------
# The output head


def head(tokens=13, vocabulary=31, width=8, dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, b = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
        for s in [(tokens, width), (vocabulary, width), (vocabulary,)]
    )
    return (
        hidden.requires_grad_(),
        weight,
        b if bias else None,
        torch.randint(vocabulary, (tokens,), generator=generator),
    )


def dense(hidden, weight, bias, targets, temperature):
    logp = (F.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("chunk", (1, 2, 13, 192))  # rows: one, two with a rest, all, more
@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-12), (torch.float32, 1e-5)))
def test_chunked_log_probs_are_the_dense_ones(monkeypatch, dtype, tolerance, chunk, bias, temperature):
    """Value, gradient and entropy, with the last chunk cut short. Scores forgot the temperature or the head's
    bias elsewhere.
    """
    monkeypatch.setattr(scoring, "CHUNK_ROWS", chunk)
    args = (*head(dtype=dtype, bias=bias), temperature)
    weights = torch.linspace(-1, 2, 13, dtype=dtype)
    results = []
    for f in (ChunkedLogProb.apply, dense):
        logp, entropy = f(*args)
        results.append((logp, entropy, torch.autograd.grad((logp * weights).sum(), args[0])[0]))
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_chunked_gradcheck(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK_ROWS", 2)
    hidden, *rest = head()
    assert torch.autograd.gradcheck(lambda h: ChunkedLogProb.apply(h, *rest, 0.7)[0], hidden)


def test_entropy_carries_no_gradient_and_none_is_computed_without_need():
    logp, entropy = ChunkedLogProb.apply(*head(), 1.0)
    assert logp.requires_grad and not entropy.requires_grad
    with torch.no_grad():
        assert not ChunkedLogProb.apply(*head(), 1.0)[0].requires_grad


def test_16_bit_states_give_fp32_log_probs():
    """Log-probabilities rounded to bf16 are off by up to 0.06 at -10: sums and ratios of them are noise."""
    args = head(width=64, dtype=torch.bfloat16, bias=False)
    logp, entropy = ChunkedLogProb.apply(*args, 1.0)
    exact = dense(*(x if x is None or not x.is_floating_point() else x.detach().double() for x in args), 1.0)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(
        logp.double(), exact[0], rtol=0.01, atol=0.1
    )  # the product of bf16 matrices is rounded to bf16
    gradient = torch.autograd.grad(logp.sum(), args[0])[0]
    h = args[0].detach().double().requires_grad_()
    exact = torch.autograd.grad(dense(h, args[1].double(), None, args[3], 1.0)[0].sum(), h)[0]
    assert gradient.dtype == torch.bfloat16 and (gradient - exact).norm() < 0.03 * exact.norm()


def peak_bytes(f):
    """Largest sum of allocations alive at once while f runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        f()
    return max(
        itertools.accumulate(
            e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]"
        )
    )


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    """151,936 columns: a 0.6B model ran out of 20 GB. Here the peak is a few chunks and what is as large as
    the hidden states.
    """
    tokens, vocabulary, width, chunk = 512, 20_000, 64, 16
    monkeypatch.setattr(scoring, "CHUNK_ROWS", chunk)
    args = (*head(tokens, vocabulary, width, torch.float32, bias=False), 1.0)

    def peak(f):
        return peak_bytes(lambda: f(*args)[0].sum().backward())

    assert peak(dense) > 4 * tokens * vocabulary  # the measure sees what it should
    assert peak(ChunkedLogProb.apply) < 4 * (3.2 * chunk * vocabulary + 5 * tokens * width)


# ------------------------------------------------------------------------------------------------------------
# Groups in one ragged row

PROMPTS = random_ids((5, 1, 9), seed=1)
COMPLETIONS = [random_ids(n, seed=i) for i, n in enumerate([(4, 1, 7), (1, 1, 12), (3, 8, 2)])]
for group in COMPLETIONS:
    for c in group[:2]:
        c[-1] = END_OF_TURN  # which is the padding id as well; the third is cut at a length limit
WEIGHTS = torch.randn(3, 3, 12, generator=torch.Generator().manual_seed(2))  # of each token in the loss


def gradients(loss, model):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora" in n}
    return dict(zip(named, torch.autograd.grad(loss, named.values())))


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys() and len(ours) > 0
    scale = max(g.abs().max() for g in theirs.values())
    assert all(g.abs().max() > 0 for g in ours.values())
    for name in ours:
        torch.testing.assert_close(
            ours[name],
            theirs[name],
            rtol=1e-4,
            atol=tolerance * float(scale),
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_groups_are_the_dense_model(shared, oracle, family):
    """Log-probs, entropy and LoRA gradients at T = 0.7; the other side sees one sequence at a time, padded on
    either side.

    What has gone wrong elsewhere: padding that shifts positions, EOS masked out because pad == eos, scores
    without the temperature, neighbours in the row or in the group that leak into each other, ragged lengths,
    lengths of 1.
    """
    scored = shared(family).token_logps(PROMPTS, COMPLETIONS, 0.7)
    model, loss = oracle(family), 0
    for b, i in itertools.product(range(3), range(3)):
        c = COMPLETIONS[b][i]
        logp, entropy = dense_logps(model, PROMPTS[b], c, 0.7, left=2 * i, right=3 * (b % 2))
        loss = loss + (logp * WEIGHTS[b, i, : len(c)]).sum()
        assert scored.mask[b, i].tolist() == [t < len(c) for t in range(12)]
        torch.testing.assert_close(scored.logps[b, i, : len(c)], logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scored.entropy[b, i, : len(c)], entropy, rtol=1e-5, atol=1e-5)
    assert (
        not scored.logps[~scored.mask].any()
        and not scored.entropy[~scored.mask].any()
        and not scored.entropy.requires_grad
    )
    assert_same_gradients(
        gradients((scored.logps * WEIGHTS).sum(), shared(family).peft), gradients(loss, model)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_are_those_of_the_slow_twin(shared, family):
    """Fifteen plain lines (pad, forward, log_softmax, gather) have the values, the mask and the gradients."""
    policy = shared(family)
    ours = policy.token_logps(PROMPTS, COMPLETIONS, 0.7)
    theirs, mask = plain_token_logps(policy.hf, PROMPTS, COMPLETIONS, 0.7)
    assert torch.equal(ours.mask, mask)
    torch.testing.assert_close(ours.logps, theirs, rtol=1e-5, atol=1e-5)
    losses = [(logps * WEIGHTS).sum() for logps in (ours.logps, theirs)]
    assert_same_gradients(*(gradients(loss, policy.peft) for loss in losses))
    # the twin left no trace
    assert torch.equal(policy.token_logps(PROMPTS, COMPLETIONS, 0.7).logps, ours.logps)


def test_the_layout_is_the_one_that_is_drawn_beside_it():
    """Pack's comment shows two prompts with two completions each; a drawing that lies is worse than none."""
    p, q, a, b, c, d = [10, 11], [20], [30, 31], [40], [50], [60, 61]
    pack = Pack([p, q], [[a, b], [c, d]], "cpu")
    assert pack.ids.tolist() == [[10, 11, 20, 30, 31, 40, 50, 60, 61]]
    assert pack.positions.tolist() == [[0, 1, 0, 2, 3, 2, 1, 1, 2]]
    assert pack.p_index.tolist() == [[0, 1], [2, 0]]
    assert pack.c_index.tolist() == [[3, 4], [5, 0], [6, 0], [7, 8]]
    assert pack.source.tolist() == [[1, 3], [1, 0], [2, 0], [2, 7]]
    assert pack.last.tolist() == [4, 5, 6, 8]
    seen = pack.attend_mask[:, 0].int().tolist()  # of each completion: (T, P + T)
    assert seen[0] == [[1, 1, 1, 0], [1, 1, 1, 1]]  # p0 p1 a0 a1
    assert seen[1][0] == [1, 1, 1, 0] and seen[2][0] == [1, 0, 1, 0]  # p0 p1 b0; q0 c0
    assert seen[3] == [[1, 0, 1, 0], [1, 0, 1, 1]]  # q0 d0 d1


@pytest.mark.parametrize(
    "family, options", (("qwen2", {}), ("qwen2", dict(quantize="nf4")), ("phi", dict(quantize="nf4")))
)
def test_lora_layers_are_pefts(load, family, options):
    """Their forward and backward are written by hand: against PEFT's own, with the adapter on, off, and in 4
    bits.
    """
    policy = load(family, **options)

    def results():
        scored, reference = (
            policy.token_logps(PROMPTS, COMPLETIONS),
            policy.token_logps(PROMPTS, COMPLETIONS, role="reference"),
        )
        return scored.logps, reference.logps, gradients((scored.logps * WEIGHTS).sum(), policy.peft)

    ours = results()
    for layer in policy.layers:
        del layer.forward  # PEFT's again
    theirs = results()
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-5, atol=2e-5)
    assert_same_gradients(ours[2], theirs[2], tolerance=1e-4)


def test_eos_receives_gradient_though_it_is_the_padding(shared):
    """A mask made of token ids would hide EOS together with the padding, and answers would never learn to
    end.
    """
    logps = shared().token_logps(PROMPTS, COMPLETIONS).logps
    ends = torch.stack([logps[b, i, len(COMPLETIONS[b][i]) - 1] for b in range(3) for i in range(2)])
    assert all(g.abs().max() > 0 for g in gradients(ends.sum(), shared().peft).values())


def test_order_and_company_do_not_matter(shared):
    """A completion's score is its own: the same with the groups reversed, inside and out, as alone."""
    score = shared().token_logps
    together = score(PROMPTS, COMPLETIONS).logps
    reversed_ = score(PROMPTS[::-1], [g[::-1] for g in COMPLETIONS[::-1]]).logps
    torch.testing.assert_close(together, reversed_.flip(0, 1), rtol=1e-5, atol=1e-5)
    for b, i in itertools.product(range(3), range(3)):
        alone = score([PROMPTS[b]], [[COMPLETIONS[b][i]]]).logps[0, 0]
        torch.testing.assert_close(together[b, i, : len(alone)], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family, options", (("qwen3", {}), ("phi", {}), ("qwen3", {"quantize": "nf4"})))
def test_checkpointed_gradients_are_the_same(load, family, options):
    """Checkpointing is silently off in eval mode, and loses all gradients where no input of a layer requires
    one.
    """
    policy, plain = load(family, gradient_checkpointing=True, **options), load(family, **options)
    calls = []
    policy.hf.base_model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    ours, theirs = (
        gradients((p.token_logps(PROMPTS, COMPLETIONS).logps * WEIGHTS).sum(), p.peft)
        for p in (policy, plain)
    )
    assert len(calls) == 2  # the second in the backward pass
    assert_same_gradients(ours, theirs)


def test_sequence_mean_and_samples(shared):
    """sequence_mean divides by each completion's own length; samples() drops the last of each group and the
    columns it alone needed.
    """
    scored = shared().token_logps(PROMPTS, COMPLETIONS)
    means = [
        [scored.logps.detach()[b, i, : len(c)].mean() for i, c in enumerate(g)]
        for b, g in enumerate(COMPLETIONS)
    ]
    torch.testing.assert_close(scored.sequence_mean().detach(), torch.tensor(means))
    samples = scored.samples()
    assert samples.logps.shape == samples.mask.shape == samples.entropy.shape == (3, 2, 8)
    assert torch.equal(samples.logps, scored.logps[:, :2, :8])


# ------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "prompts, completions",
    (
        ([[5], [6]], [[[7]]]),  # a group is missing
        ([[5], [6]], [[[7]], [[7], [8]]]),  # groups of different sizes
        ([[]], [[[7]]]),
        ([[5]], [[[7], []]]),
        ([[5]], [[]]),
        ([], []),
    ),
)
def test_malformed_groups_are_refused(prompts, completions):
    """An empty completion would have no position to be predicted from and a mean of 0/0."""
    with pytest.raises(ValueError):
        Pack(prompts, completions, "cpu")


def test_sliding_window_shorter_than_the_text_is_refused(model_dir):
    """Every token would see the whole text, unlike in the model's own forward pass, and no number would look
    wrong.
    """
    policy = Policy.load(model_dir("mistral", sliding_window=8), device="cpu", dtype="float32")
    policy.token_logps([[5] * 4], [[[6] * 4]])
    policy.generate([[5] * 4], max_new_tokens=4)
    with pytest.raises(UserError, match="sliding window"):
        policy.token_logps([[5] * 4], [[[6] * 5]])
    with pytest.raises(UserError, match="sliding window"):
        policy.generate([[5] * 4], max_new_tokens=5)


@pytest.mark.parametrize(
    "family, feature",
    (
        ("gemma3_text", dict(final_logit_softcapping=30.0)),
        ("cohere", dict(logit_scale=0.1)),
        ("granite", dict(logits_scaling=8.0)),
    ),
)
def test_what_happens_to_logits_after_the_head_is_refused(model_dir, family, feature):
    """Log-probabilities without it would be another model's."""
    with pytest.raises(UserError, match=next(iter(feature))):
        Policy.load(model_dir(family, **feature), device="cpu")


@pytest.mark.parametrize("feature", (dict(softcap=50.0), dict(s_aux=torch.zeros(4)), dict(sliding_window=4)))
def test_attention_that_is_not_plain_is_refused(feature):
    pack = Pack([[5, 6, 7]], [[[8, 9]]], "cpu")
    q = torch.zeros(1, 4, 5, 16)
    module = torch.nn.Module()
    module.layer_idx = 0
    assert scoring.shared_prefix_attention(module, q, q, q, None, layout=pack)[0].shape == (1, 5, 4, 16)
    with pytest.raises(UserError):
        scoring.shared_prefix_attention(module, q, q, q, None, layout=pack, **feature)


# ------------------------------------------------------------------------------------------------------------
# Groups too large for one pass


@pytest.mark.parametrize("options", ({}, {"gradient_checkpointing": True}, {"quantize": "nf4"}))
def test_a_group_in_several_passes_has_the_log_probs_and_the_gradient_of_one(monkeypatch, load, options):
    """Passes of 2, 2 and 1 completions of 5, unequal lengths: values, entropies, mask, and gradient."""
    deep = load(**options)
    prompts, completions = (
        random_ids([3, 5]),
        [random_ids([4, 7, 2, 3, 9], seed=1), random_ids([6, 1, 5, 8, 2], seed=2)],
    )
    results = []
    for limit in (10**6, 20):
        monkeypatch.setattr(policy_module, "PASS_TOKENS", limit)
        scored = deep.token_logps(prompts, completions, 0.7)
        weights = torch.linspace(-1, 2, scored.logps.numel()).view_as(scored.logps)
        grads = torch.autograd.grad((scored.logps * weights).sum(), list(deep.trainable().values()))
        results.append((scored.logps.detach(), scored.entropy, scored.mask, *grads))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_values_in_several_passes(monkeypatch, load):
    deep = load()
    randomise_all(deep.add_role("value", bias=True))
    prompts, completions = random_ids([3]), [random_ids([4, 7, 2], seed=1)]
    whole = deep.token_values(prompts, completions)
    monkeypatch.setattr(policy_module, "PASS_TOKENS", 5)
    torch.testing.assert_close(deep.token_values(prompts, completions), whole)


def test_memory_kept_for_the_backward_pass_is_that_of_one_pass(monkeypatch, load):
    """A group of 8 x 64 tokens kept the activations of 512 tokens; in passes of 64 it keeps next to nothing
    until one is computed again.
    """
    deep = load()
    kept = []
    for limit in (10**6, 64):
        monkeypatch.setattr(policy_module, "PASS_TOKENS", limit)
        storages = {}

        def keep(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            deep.token_logps(random_ids([4]), [random_ids([64] * 8, seed=1)])
        weights = {p.untyped_storage().data_ptr() for p in deep.hf.parameters()}
        kept.append(
            sum(x.untyped_storage().nbytes() for pointer, x in storages.items() if pointer not in weights)
        )
    assert kept[1] < 0.1 * kept[0]
