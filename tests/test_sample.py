import pytest
import torch
from transformers import Qwen3Config

from sample import draw, generate
from tests.reference import full_recompute, live

CONFIG = Qwen3Config(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.3,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


@pytest.fixture(scope="module")
def model():
    return live(CONFIG, seed=0).double()


def ragged_prompts(n: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 40, (int(torch.randint(1, longest, (1,), generator=g)),), generator=g).tolist()
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    "stop_ids", [(), (3,), (3, 11, 17, 22, 30)]
)  # ends never, sometimes, soon: rows leave the batch
@pytest.mark.parametrize("cap", [1, 5, 60])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_equals_the_full_recompute_sampler_under_the_same_noise(model, stop_ids, cap, temperature):
    prompts = ragged_prompts(9)
    generator = torch.Generator().manual_seed(5)
    rollout = generate(model, prompts, cap, stop_ids, temperature, generator=generator)
    uniforms = torch.rand(9, cap, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for i, prompt in enumerate(prompts):
        def choose(logits, step, i=i):
            if temperature == 0:
                return int(logits.argmax())
            p = (logits / temperature).softmax(-1)
            return int((p.cumsum(-1) <= uniforms[i, step]).sum())

        expected = full_recompute(model, prompt, cap, stop_ids, choose)
        assert rollout.response(i) == expected
        assert bool(rollout.finished[i]) == (expected[-1] in stop_ids)
        assert rollout.tokens[i, : len(prompt)].tolist() == prompt
        assert not rollout.tokens[i, len(prompt) + len(expected) :].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_training_forward(model, temperature):
    rollout = generate(model, ragged_prompts(8), 40, (3, 4), temperature, generator=torch.Generator().manual_seed(1))
    log_p = ((model(rollout.tokens) @ model.head.T) / temperature).log_softmax(-1)
    for i, (start, n) in enumerate(zip(rollout.prompt_lens, rollout.lens)):
        expected = log_p[i, start - 1 : start + n - 1].gather(-1, rollout.tokens[i, start : start + n, None])[:, 0]
        assert torch.allclose(rollout.logprobs[i, :n].double(), expected, atol=1e-5)
        assert not rollout.logprobs[i, n:].any()


def test_a_row_alone_is_the_row_in_a_batch(model):
    prompts = ragged_prompts(7, seed=2)
    together = generate(model, prompts, 30, (5, 6), temperature=0.0)
    for i, prompt in enumerate(prompts):
        assert generate(model, [prompt], 30, (5, 6), temperature=0.0).response(0) == together.response(i)


def test_same_seed_same_rollout_other_seed_another(model):
    a, b, c = (
        generate(model, ragged_prompts(4), 20, (), generator=torch.Generator().manual_seed(seed)).tokens
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_ids_beyond_the_vocabulary_are_never_drawn(model):
    rollout = generate(
        model, ragged_prompts(20), 50, (), temperature=3.0, vocab=7, generator=torch.Generator().manual_seed(0)
    )
    for i in range(20):
        assert max(rollout.response(i)) < 7


def test_draws_follow_the_distribution():
    """Chi-square of 40,000 draws against the probabilities; 15 degrees of freedom, the 99.9% point is 37.7."""
    g = torch.Generator().manual_seed(0)
    logits, n = torch.randn(16, generator=g) * 1.5, 40_000
    tokens, logprobs = draw(logits.expand(n, 16), torch.rand(n, generator=g, dtype=torch.float64), temperature=0.8)
    p = (logits / 0.8).softmax(-1)
    counts = torch.bincount(tokens, minlength=16)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 37.7
    assert torch.allclose(logprobs, p.log()[tokens], atol=1e-5)


def test_impossible_tokens_are_not_drawn_at_the_ends_of_the_interval():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(4, 5)
    tokens, _ = draw(logits, torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-16], dtype=torch.float64), temperature=1.0)
    assert tokens.tolist() == [1, 1, 3, 3]


def test_top_k_and_top_p_keep_the_most_likely():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(1000, 4)
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert set(draw(logits, u, 1.0, top_k=2)[0].tolist()) == {0, 1}
    assert set(draw(logits, u, 1.0, top_p=0.7)[0].tolist()) == {0, 1}
    assert set(draw(logits, u, 1.0, top_p=0.8)[0].tolist()) == {0, 1, 2}
    assert set(draw(logits, u, 1.0, top_p=1e-6)[0].tolist()) == {0}


def test_attended_pairs_are_counted(model):
    rollout = generate(model, [[1, 2, 3], [4]], 3, (), temperature=0.0)
    assert rollout.pairs == (1 + 2 + 3) + (4 + 5) + (1) + (2 + 3)  # prefill triangle, then two decoded tokens a row


def test_unusable_arguments_are_named(model):
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], 5, ())
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        generate(model, [[1]], 0, ())
