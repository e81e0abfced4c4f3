"""Drawing tokens, and the decode loop against transformers' own generate and against the scores."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import END_OF_TEXT, END_OF_TURN, FAMILIES, ROOT, WORDS, random_ids
from peft.tuners.lora import LoraLayer

from engine import sampling
from engine.sampling import ALMOST_1, HFDecoder, LlamaDecoder, draw, merged_weight, plain_generate

PROMPTS = random_ids((5, 1, 9), seed=1)

# ------------------------------------------------------------------------------------------------------------
# One token


def test_draw_follows_the_distribution():
    """Evenly spaced uniforms give each token its probability to the last draw; random ones pass a chi-square
    test (16 d.o.f.).
    """
    n = 40_000
    logits = torch.randn(17, generator=torch.Generator().manual_seed(3)) * 2
    p = (logits.double() / 0.7).softmax(-1)
    counts = torch.bincount(draw(logits.expand(n, -1), 0.7, (torch.arange(n) + 0.5) / n)[0], minlength=17)
    assert (counts - n * p).abs().max() <= 1.01
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(4))
    counts = torch.bincount(draw(logits.expand(n, -1), 0.7, uniform)[0], minlength=17)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 39.25  # the 99.9 % point


@pytest.mark.parametrize("temperature", (1.0, 0.7, 0))
def test_draw_reports_the_log_probability(temperature):
    """At the sampling temperature, as the scores: trainers have divided one of the two only."""
    logits = torch.randn(50, 17, generator=torch.Generator().manual_seed(5)).bfloat16()
    tokens, logp = draw(logits, temperature, torch.linspace(0, ALMOST_1, 50))
    expected = (logits.float() / (temperature or 1)).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logp, expected)
    if temperature == 0:
        assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("vocabulary", (5, 151_936))
def test_draw_never_takes_a_token_of_probability_0(vocabulary):
    """An fp32 cumulative sum ends below or above 1, so the last uniforms fell off its end or onto a token
    that cannot be.
    """
    logits = torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(6))
    logits[:, [0, 2, -1]] = -torch.inf
    ends = logits.softmax(-1).cumsum(-1)[:, -1]
    assert vocabulary == 5 or ends.min() < ALMOST_1 <= ends.max()  # the cases that it is about
    for uniform in (0.0, 2**-24, 0.5, 1 - 2**-12, ALMOST_1):
        tokens, logp = draw(logits, 1.0, torch.full((20,), uniform))
        assert logits.gather(-1, tokens[:, None]).isfinite().all() and logp.isfinite().all()
        assert uniform > 0 or (tokens == 1).all()
        assert uniform < ALMOST_1 or (tokens >= 0.99 * vocabulary - 2).all()


@pytest.mark.parametrize("uniform", (0.0, ALMOST_1))
@pytest.mark.parametrize(
    "logits, only",
    (([3e4, -3e4, 0.0], 0), ([-1e30, 2e4, -1e30], 1), ([0.0, 0.0, 1e6], 2), ([-1e9, -1e9, -1e9 + 1e4], 2)),
)
def test_draw_survives_extreme_logits(logits, only, uniform):
    token, logp = draw(torch.tensor([logits]), 0.7, torch.tensor([uniform]))
    assert token.item() == only and logp.item() == 0


# ------------------------------------------------------------------------------------------------------------
# The decode loop


def assert_scores_agree(policy, prompts, rollout, temperature, tolerance=1e-5):
    scored = policy.token_logps(prompts, rollout.completions, temperature)
    for b, group in enumerate(rollout.logps):
        for i, logps in enumerate(group):
            torch.testing.assert_close(
                torch.tensor(logps), scored.logps[b, i, : len(logps)].detach(), rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probs_are_the_scored_ones(shared, family):
    """Unequal prompts, rows that end and leave the batch, a random adapter: the ratio of the first update
    must be 1.
    """
    policy = shared(family)
    rollout = policy.generate(PROMPTS, 8, max_new_tokens=30, temperature=3.0)
    assert {len(c) for group in rollout.completions for c in group} > {30}
    assert_scores_agree(policy, PROMPTS, rollout, 3.0)
    assert type(policy.sampler.decoder) is (HFDecoder if family in ("phi", "gpt_neox") else LlamaDecoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_generate(shared, oracle, family):
    """Token by token; the other side takes the prompts one at a time, so padding cannot be wrong in the same
    way.
    """
    rollout = shared(family).generate(PROMPTS, 2, max_new_tokens=16, temperature=0)
    for prompt, group, truncated in zip(PROMPTS, rollout.completions, rollout.truncated):
        ids = torch.tensor([prompt])
        expected = (
            oracle(family)
            .generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[
                0, len(prompt) :
            ]
            .tolist()
        )
        assert group == [expected] * 2
        assert truncated == [expected[-1] not in (END_OF_TURN, END_OF_TEXT)] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", (1.5, 0))
def test_samples_are_those_of_the_slow_twin(shared, family, temperature):
    """A plain loop without cache, batch or merged weights draws the same tokens from the same numbers."""
    policy, options = shared(family), dict(max_new_tokens=10, temperature=temperature, seed=5)
    ours = policy.generate(PROMPTS, 3, **options)
    theirs = plain_generate(policy.hf, policy.eos_ids, PROMPTS, 3, **options)
    assert ours.completions == theirs.completions and ours.truncated == theirs.truncated
    for mine, other in zip(itertools.chain(*ours.logps), itertools.chain(*theirs.logps)):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), rtol=1e-5, atol=1e-5)


def test_a_seed_decides_whatever_the_batching(shared, monkeypatch):
    """Memory decides how many prompts decode together; it must not decide what a seed gives, nor must a
    neighbour.
    """
    policy = shared()

    def generate(prompts=PROMPTS, seed=7):
        return policy.generate(prompts, 3, max_new_tokens=12, temperature=1.5, seed=seed)

    batches = []
    together = generate()
    decode = policy.sampler.decode
    monkeypatch.setattr(
        policy.sampler,
        "decode",
        lambda prompts, *rest: batches.append(len(prompts)) or decode(prompts, *rest),
    )
    torch.manual_seed(123)  # the global generator has no say
    assert generate().completions == together.completions
    assert generate(seed=8).completions != together.completions
    assert generate(PROMPTS[:1]).completions == together.completions[:1]
    for constant, value in (("KV_BYTES", 1), ("LOGITS", 6 * len(WORDS))):
        with monkeypatch.context() as m:
            m.setattr(sampling, constant, value)
            assert generate().completions == together.completions
    assert batches == [3, 3, 1, 1, 1, 1, 2, 1]


def test_every_eos_of_the_generation_config_ends_an_answer(shared):
    """Qwen3 has two; with the tokenizer's alone, half of the answers ran on to the limit and were paid as
    truncated.
    """
    limit, ends = 6, (END_OF_TURN, END_OF_TEXT)
    rollout = shared().generate(PROMPTS, 200, max_new_tokens=limit, temperature=8.0)
    seen = set()
    for c, truncated in zip(itertools.chain(*rollout.completions), itertools.chain(*rollout.truncated)):
        assert not set(c[:-1]) & set(ends)
        assert truncated == (c[-1] not in ends) and (len(c) == limit or not truncated)
        seen.add((c[-1] if c[-1] in ends else None, len(c) == limit))
    assert seen == {
        (None, True),
        (END_OF_TURN, False),
        (END_OF_TURN, True),
        (END_OF_TEXT, False),
        (END_OF_TEXT, True),
    }
    assert [[len(x) for x in g] for g in rollout.logps] == [[len(x) for x in g] for g in rollout.completions]


@pytest.mark.parametrize("family", ("qwen3", "phi"))
def test_finished_rows_leave_the_batch_and_disturb_nobody(shared, monkeypatch, family):
    """Rows that are dropped take their cache, mask, position and random numbers along; a slip in one shifts
    everyone behind them.
    """
    policy, kept = shared(family), []
    keep = sampling.Cache.keep
    monkeypatch.setattr(sampling.Cache, "keep", lambda self, rows: kept.append(len(rows)) or keep(self, rows))
    dropped = policy.generate(PROMPTS, 10, max_new_tokens=60, temperature=8.0)
    assert len(kept) >= 3 and kept == sorted(kept, reverse=True)
    monkeypatch.setattr(sampling.Cache, "keep", keep)
    alone = [
        policy.generate([p] * 3, 10, max_new_tokens=60, temperature=8.0).completions[b]
        for b, p in enumerate(PROMPTS)
    ]
    assert dropped.completions == alone
    assert_scores_agree(policy, PROMPTS, dropped, 8.0)


@pytest.mark.parametrize("family", ("qwen3", "phi"))
@pytest.mark.parametrize("look, reach", ((8, 64), (3, 16)))
def test_looking_seldom_changes_no_token(shared, monkeypatch, family, look, reach):
    """As on a GPU: between looks ended rows go on, and attention reads slots that nobody has written yet.
    Neither a token behind an EOS nor an empty slot may show.
    """
    policy, kept = shared(family), []
    always = policy.generate(PROMPTS, 10, max_new_tokens=60, temperature=8.0)
    keep = sampling.Cache.keep
    monkeypatch.setattr(sampling.Cache, "keep", lambda self, rows: kept.append(len(rows)) or keep(self, rows))
    monkeypatch.setattr(policy.sampler, "look", look)
    monkeypatch.setattr(policy.sampler, "reach", reach)
    seldom = policy.generate(PROMPTS, 10, max_new_tokens=60, temperature=8.0)
    assert len(kept) >= 2 and seldom.completions == always.completions
    assert seldom.truncated == always.truncated
    assert_scores_agree(policy, PROMPTS, seldom, 8.0)


def test_one_token_at_most(shared):
    rollout = shared().generate(PROMPTS, 2, max_new_tokens=1)
    assert [[len(c) for c in g] for g in rollout.completions] == [[1, 1]] * 3
    assert_scores_agree(shared(), PROMPTS, rollout, 1.0)


def test_the_adapter_of_today_is_sampled(load):
    """Weights are merged into a copy: not refreshed, it would go on sampling from the policy before the last
    step.
    """
    policy = load()
    before = policy.generate(PROMPTS, 2, max_new_tokens=8)
    for p in policy.trainable().values():
        p.data *= 1.5
    after = policy.generate(PROMPTS, 2, max_new_tokens=8)
    assert before.logps != after.logps
    assert_scores_agree(policy, PROMPTS, after, 1.0)


@pytest.mark.parametrize("family", ("qwen3", "qwen2", "phi"))
def test_sampling_from_nf4(load, family):
    """The merged copy is W dequantised + scaling * B A, which is what PEFT's layer computes, and scores agree
    with it.
    """
    policy = load(family, quantize="nf4")
    layer = next(m for m in policy.hf.modules() if isinstance(m, LoraLayer))
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias
        torch.testing.assert_close(
            type(layer).forward(layer, x), x @ merged_weight(layer).T + bias, rtol=1e-4, atol=1e-4
        )
        policy.activate(None)
        torch.testing.assert_close(
            layer.base_layer(x), x @ merged_weight(layer).T + bias, rtol=1e-4, atol=1e-4
        )
        policy.activate("default")
    rollout = policy.generate(PROMPTS, 2, max_new_tokens=8)
    assert_scores_agree(policy, PROMPTS, rollout, 1.0, tolerance=1e-4)


@pytest.mark.parametrize("family", ("qwen3", "phi"))
def test_sampling_with_gradient_checkpointing(load, shared, family):
    """Checkpointing switches the KV cache off in many trainers, and each new token then reads the whole text
    again, or nothing.
    """
    policy = load(family, gradient_checkpointing=True)
    assert (
        policy.generate(PROMPTS, 2, max_new_tokens=8).completions
        == shared(family).generate(PROMPTS, 2, max_new_tokens=8).completions
    )


def test_bf16_samples_are_close_to_bf16_scores(load):
    """The two round differently; what is left is logged as the mismatch. A wrong mask or scale is off by
    whole nats.
    """
    policy = load(dtype="bfloat16")
    rollout = policy.generate(PROMPTS, 4, max_new_tokens=8)
    assert_scores_agree(policy, PROMPTS, rollout, 1.0, tolerance=0.15)


# ------------------------------------------------------------------------------------------------------------
# Packed weights

X86 = "AVX" in torch.backends.cpu.get_cpu_capability()


@pytest.mark.skipif(not X86, reason="oneDNN's packed layout is used on x86 CPUs only")
@pytest.mark.parametrize("rows", (1, 8, 300))
def test_a_packed_product_is_the_plain_one(rows):
    """The slow twin of the decode step's products: F.linear on the weight before packing."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 1, 70, generator=generator), torch.randn(45, 70, generator=generator)
    bias = torch.randn(45, generator=generator)
    packed = sampling.prepack(weight)
    assert packed.is_mkldnn
    for b in (bias, None):
        torch.testing.assert_close(
            sampling.linear(x, packed, b), F.linear(x, weight, b), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", ("qwen3", "qwen2"))
def test_packing_changes_no_fp32_token(shared, monkeypatch, family):
    """Packed for speed alone: the tokens are those of plain weights, and so are their log-probabilities."""
    policy = shared(family)
    packed = policy.generate(PROMPTS, 8, max_new_tokens=30, temperature=1.5)
    monkeypatch.setattr(sampling, "prepack", lambda weight: weight)
    plain = policy.generate(PROMPTS, 8, max_new_tokens=30, temperature=1.5)
    assert packed.completions == plain.completions
    for ours, theirs in zip(itertools.chain(*packed.logps), itertools.chain(*plain.logps)):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not X86, reason="the variables name x86 instruction sets")
def test_bf16_on_a_cpu_without_avx512():
    """Most laptops: oneDNN is there, but refuses bf16 weights. --dtype bfloat16 ended in its RuntimeError."""
    program = (
        "from policy import Policy\n"
        "policy = Policy.load('tiny', quantize='none', device='cpu', dtype='bfloat16')\n"
        "rollout = policy.generate([policy.encode_prompt('list 3 animals')], 2, max_new_tokens=4)\n"
        "policy.token_logps([[5, 6]], [rollout.completions[0]]).logps.sum().backward()\n"
        "print('sampled', len(rollout.completions[0]))"
    )
    avx2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | avx2, capture_output=True, text=True
    )
    assert done.returncode == 0 and "sampled 2" in done.stdout, done.stderr
