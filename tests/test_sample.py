import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import sample
from data import InputError
from model import Transformer, count_flops
from sample import KVCache, Rollout, generate, sample_token, shorten
from tests.reference import full_recompute, live
from tests.test_model import FAMILIES

CONFIG = Qwen3Config(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


@pytest.fixture(scope="module")
def model():
    return live(CONFIG, seed=0).double()


def ragged_prompts(n: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (int(torch.randint(1, longest, (1,), generator=g)),), generator=g).tolist()
            for _ in range(n)]


def naive(model, prompts, cap, stop_ids, temperature) -> list[list[int]]:
    """The same rows by recomputing everything for every token, one at a time, under the same noise."""
    responses = []
    for i, prompt in enumerate(prompts):
        noise = torch.rand(cap, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

        def choose(logits, step, noise=noise):
            if temperature == 0:
                return int(logits.argmax())
            return int(((logits / temperature).softmax(-1).cumsum(-1) <= noise[step]).sum())

        responses.append(full_recompute(model, prompt, cap, stop_ids, choose))
    return responses


def check(rollout, prompts, stop_ids, expected):
    for i, (prompt, response) in enumerate(zip(prompts, expected)):
        assert rollout.response(i) == response, i
        assert bool(rollout.finished[i]) == (response[-1] in stop_ids)
        assert rollout.tokens[i, : len(prompt)].tolist() == prompt
        assert not rollout.tokens[i, len(prompt) + len(response) :].any()


# --- the cache


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_with_the_cache_is_reading_without_it(family, rows):
    """Ragged prompts into slots of a larger cache, then six steps, against the forward of whole rows."""
    model = live(FAMILIES[family], seed=3).double().requires_grad_(False)
    model.vocab = 90
    g = torch.Generator().manual_seed(rows)
    tokens, lens = torch.randint(97, (rows, 15), generator=g), torch.randint(1, 10, (rows,), generator=g)
    full = model(tokens)  # row i: lens[i] tokens of prompt, then six more
    cache = KVCache(model.config, rows + 2, 20, "cpu", torch.float64)
    slots = torch.randperm(rows + 2, generator=g)[:rows]
    for x in (cache.k, cache.v):
        x.fill_(math.nan)  # what nobody has written must not be seen
        x[:, :, :, 15:] = 0
    cache.write_prompts(slots)
    assert torch.allclose(model(tokens[:, :9], cache=cache), full[:, :9], rtol=0, atol=1e-12)
    cache.k, cache.v = (torch.where(x.isnan(), 0.0, x) for x in (cache.k, cache.v))
    for step in range(6):
        at = torch.zeros(rows + 2, dtype=torch.long)
        at[slots] = lens + step
        new = torch.zeros(rows + 2, dtype=torch.long)
        new[slots] = tokens[torch.arange(rows), lens + step]
        cache.write_at(at, int(at.max()) + 1 + step % 2)
        found = model(new[:, None], at[:, None], cache)[slots, 0]
        expected = full[torch.arange(rows), lens + step]
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        assert torch.allclose(model.logits(found), expected @ model.head[:90].T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("tied", [True, False])
def test_a_refreshed_copy_is_the_model_at_the_old_addresses(tied):
    model = live(Qwen3Config(**{**CONFIG.to_dict(), "tie_word_embeddings": tied}), seed=0)
    sampler = copy.deepcopy(model).double().requires_grad_(False)
    before = [p.data_ptr() for p in sampler.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    (model(torch.arange(12).view(2, 6)) @ model.head.T).square().sum().backward()
    optimizer.step()
    sampler.copy_from(model)
    assert [p.data_ptr() for p in sampler.parameters()] == before
    tokens = torch.randint(0, 40, (3, 9))
    assert torch.equal(sampler(tokens), model.double()(tokens))


def test_one_cache_serves_the_run(model):
    generate(model, ragged_prompts(6), 40, (), slots=4)
    k = model.cache.k
    assert k.shape[1] >= 4 and k.shape[3] % 64 == 0
    generate(model, ragged_prompts(4), 30, ())
    assert model.cache.k is k
    generate(model, ragged_prompts(9), 30, (), slots=9)
    assert model.cache.k.shape[1] == 9 and model.cache.k.shape[3] == k.shape[3]


# --- sampling


@pytest.mark.parametrize("cap", [1, 12, 60])  # with the prompts, 60 goes beyond a LENGTH_STEP
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_equals_the_full_recompute_sampler_under_the_same_noise(model, cap, temperature):
    """Random numbers of rows, slots and stop tokens, so that rows end, enter and move in random order. What a row
    samples is a function of all its tokens, so one wrong key in the cache would show."""
    g = torch.Generator().manual_seed(cap)
    for trial in range(6):
        n, slots, stops = (int(torch.randint(least, 15, (), generator=g)) for least in (1, 1, 0))
        prompts, stop_ids = ragged_prompts(n, seed=100 + trial), tuple(range(stops))
        rollout = generate(model, prompts, cap, stop_ids, temperature, slots=slots)
        check(rollout, prompts, stop_ids, naive(model, prompts, cap, stop_ids, temperature))


def test_no_token_beyond_the_cap_is_computed(model, monkeypatch):
    """Every decode step writes at a position below prompt + cap - 1: the last token is never fed back."""
    seen, step = [], sample.next_tokens
    monkeypatch.setattr(sample, "next_tokens", lambda model, tokens, positions, *rest: seen.append(positions.clone())
                        or step(model, tokens, positions, *rest))
    prompts = [[1, 2, 3]] * 5
    rollout = generate(model, prompts, 7, (), slots=2)
    assert torch.cat(seen).max() == 3 + 7 - 2 and rollout.lens.tolist() == [7] * 5
    assert rollout.flop == count_flops(model.config, torch.full((5,), 3 + 6), 5 * 7)
    seen.clear()
    generate(model, prompts, 1, ())
    assert not seen


def test_a_rows_noise_is_its_own(model):
    """It depends on no other row, nor on the slots or the cap; and a row can be sampled again alone."""
    prompts, seeds = ragged_prompts(6, seed=2), [11, 22, 33, 44, 55, 66]
    together = generate(model, prompts, 30, (5, 6), seeds=seeds)
    for i in (0, 3, 5):
        assert generate(model, [prompts[i]], 30, (5, 6), seeds=[seeds[i]]).response(0) == together.response(i)
    shorter = generate(model, prompts, 7, (5, 6), seeds=seeds, slots=2)
    assert all(shorter.response(i) == together.response(i)[:7] for i in range(6))
    assert not torch.equal(generate(model, prompts, 30, (5, 6)).tokens, together.tokens)  # other seeds


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_greedy_equals_transformers_generate(family, tmp_path):
    live(FAMILIES[family], seed=2).save_pretrained(tmp_path)
    reference, ours = AutoModelForCausalLM.from_pretrained(tmp_path), Transformer.from_pretrained(tmp_path)
    for prompt in ragged_prompts(4, seed=9):
        theirs = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=25,
            do_sample=False, eos_token_id=[7, 8], pad_token_id=0,
        )
        assert generate(ours, [prompt], 25, (7, 8), 0.0).response(0) == theirs[0, len(prompt) :].tolist()


# --- one token


@pytest.mark.parametrize("v", [1, 5, 257, 3000])
def test_a_token_is_the_inverse_of_the_cumulative_distribution(v):
    g = torch.Generator().manual_seed(v)
    logits = 3 * torch.randn(v, generator=g, dtype=torch.float64)
    u = torch.rand(2000, generator=g, dtype=torch.float64)
    p = (logits / 0.7).softmax(-1)
    expected = (p.cumsum(-1) <= u[:, None]).sum(-1).clamp(max=v - 1)
    assert torch.equal(sample_token(logits.expand(2000, v), u, 0.7), expected)


def test_rare_tokens_of_a_large_vocabulary_are_sampled_as_often_as_they_should():
    """150,000 tokens that share 1% of the mass, in float32: where a float32 cumulative sum goes wrong."""
    logits = torch.full((150_000,), math.log(0.01 / 149_999))
    logits[0] = math.log(0.99)
    u = torch.linspace(0.99, 1, 2001, dtype=torch.float64)[:-1]
    tokens = torch.cat([sample_token(logits.expand(100, -1), part, 1.0) for part in u.split(100)])
    expected = ((u - 0.99) / 0.01 * 149_999).floor() + 1
    assert (tokens - expected).abs().max() < 30  # float32 probabilities; a float32 sum is off by thousands


def test_impossible_tokens_are_not_sampled_at_the_ends_of_the_interval():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(4, 5)
    u = torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert sample_token(logits, u, 1.0).tolist() == [1, 1, 3, 3]


def test_top_k_and_top_p_keep_the_most_likely():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(1000, 4)
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for cut, kept in (({"top_k": 2}, {0, 1}), ({"top_p": 0.7}, {0, 1}), ({"top_p": 0.8}, {0, 1, 2}),
                      ({"top_p": 1e-6}, {0})):
        assert set(sample_token(logits, u, 1.0, **cut).tolist()) == kept


# --- the rest


def test_micro_batches_hold_every_supervised_token_once_within_their_size():
    g = torch.Generator().manual_seed(0)
    prompts = ragged_prompts(30, seed=1)
    responses = [torch.randint(1, 40, (int(torch.randint(1, 60, (), generator=g)),), generator=g).tolist()
                 for _ in prompts]
    rollout = Rollout.of(prompts, responses, (3,))
    for micro_tokens in (1, 100, 10_000):
        seen, lengths = 0, []
        for rows in rollout.micro_batches(micro_tokens):
            tokens, at, targets, position = rollout.part(rows, "cpu")
            b, T = tokens.shape
            assert b == len(rows) and b * (T + 1) <= max(micro_tokens, T + 1)
            assert len(at) == len(targets) == len(position)
            for i, y, p in zip(at.tolist(), targets.tolist(), position.tolist()):
                row = int(rows[i // T])
                assert i % T == len(prompts[row]) - 1 + p and y == responses[row][p]
            seen += len(position)
            lengths.append(T)
            ends = rollout.prompt_lens[rows] + rollout.lens[rows]
            assert ends.max() <= 2 * ends.min()  # or much of it would be padding
        assert seen == rollout.num_supervised() == sum(map(len, responses))
        assert lengths == sorted(lengths, reverse=True)
    rollout.for_teacher = rollout.with_prompts([[1] * 50] * 30)  # what it reads is longer
    for rows in rollout.micro_batches(200):
        b, T = rollout.for_teacher.part(rows, "cpu")[0].shape
        assert b * (T + 1) <= max(200, T + 1)


def test_long_responses_are_shortened_in_the_middle():
    text = "\n".join(map(str, range(100)))
    assert shorten(text, 8) == "0\n1\n2\n3\n4\n5\n[... 92 lines ...]\n98\n99"
    assert shorten(text, 0) == text and shorten(text, 99) == text


def test_unusable_arguments_are_named(model):
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], 5, ())
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        generate(model, [[1]], 0, ())
    with pytest.raises(ValueError, match="seeds has 1 entries for 2 rows"):
        generate(model, [[1], [1]], 5, (), seeds=[1])
    with pytest.raises(InputError, match="exceed the 256 positions of the model"):
        generate(model, [[1] * 200], 100, ())
