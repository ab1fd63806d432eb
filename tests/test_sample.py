import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from model import Decoder, KVCache, Transformer
from sample import draw, generate, slot_bytes, slots_for
from tests.reference import full_recompute, live
from tests.test_model import FAMILIES

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


def naive(model, prompts, cap, stop_ids, temperature=1.0, seed=5, forced=None) -> list[list[int]]:
    """The same rows by recomputing everything for every token, one at a time, under the same noise."""
    seeds = torch.randint(2**63 - 1, (len(prompts),), generator=torch.Generator().manual_seed(seed)).tolist()
    responses = []
    for i, prompt in enumerate(prompts):
        noise = torch.rand(cap, generator=torch.Generator().manual_seed(seeds[i]), dtype=torch.float64)
        start = [] if forced is None else forced[i]

        def choose(logits, step, noise=noise, start=start):
            if temperature == 0:
                return int(logits.argmax())
            p = (logits / temperature).softmax(-1)
            return int((p.cumsum(-1) <= noise[len(start) + step]).sum())

        done = len(start) >= cap or (start and start[-1] in stop_ids)
        rest = [] if done else full_recompute(model, prompt + start, cap - len(start), stop_ids, choose)
        responses.append(start + rest)
    return responses


def check(rollout, prompts, cap, stop_ids, expected):
    for i, (prompt, response) in enumerate(zip(prompts, expected)):
        assert rollout.response(i) == response, i
        assert bool(rollout.finished[i]) == (response[-1] in stop_ids)
        assert rollout.tokens[i, : len(prompt)].tolist() == prompt
        assert not rollout.tokens[i, len(prompt) + len(response) :].any()


@pytest.mark.parametrize(
    "stop_ids", [(), (3,), (3, 11, 17, 22, 30)]
)  # ends never, sometimes, soon: rows leave the batch
@pytest.mark.parametrize("cap", [1, 5, 60])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_equals_the_full_recompute_sampler_under_the_same_noise(model, stop_ids, cap, temperature):
    prompts = ragged_prompts(9)
    expected = naive(model, prompts, cap, stop_ids, temperature)
    for slots in (None, 4, 1):
        rollout = generate(
            model, prompts, cap, stop_ids, temperature, generator=torch.Generator().manual_seed(5), slots=slots
        )
        check(rollout, prompts, cap, stop_ids, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_samples_as_it_recomputes(family):
    model = live(FAMILIES[family], seed=1).double()
    prompts = ragged_prompts(5, seed=3)
    rollout = generate(model, prompts, 12, (3, 9), generator=torch.Generator().manual_seed(5), slots=2)
    check(rollout, prompts, 12, (3, 9), naive(model, prompts, 12, (3, 9)))


@pytest.mark.parametrize("look_every", [1, 3, 16])
def test_rows_end_and_enter_at_every_possible_moment(model, look_every, monkeypatch):
    """Lengths are scripted: each row draws its stop at a random step, so refills and moves happen in random order. What
    a row says is a function of all it has heard, so one wrong key in the cache would show."""
    monkeypatch.setattr("sample.LOOK_EVERY", {"cpu": look_every})
    g = torch.Generator().manual_seed(look_every)
    for trial in range(12):
        n, cap = int(torch.randint(1, 14, (), generator=g)), int(torch.randint(1, 20, (), generator=g))
        prompts = ragged_prompts(n, seed=100 + trial)
        forced = [torch.randint(0, 40, (int(torch.randint(0, 6, (), generator=g)),), generator=g).tolist()
                  for _ in range(n)]  # fmt: skip
        stop_ids = tuple(range(int(torch.randint(0, 12, (), generator=g))))
        slots = int(torch.randint(1, n + 2, (), generator=g))
        rollout = generate(
            model, prompts, cap, stop_ids, generator=torch.Generator().manual_seed(5), slots=slots, forced=forced
        )
        check(rollout, prompts, cap, stop_ids, naive(model, prompts, cap, stop_ids, forced=forced))
        assert rollout.forced_lens.tolist() == [len(f) for f in forced]
        assert all(not rollout.logprobs[i, : rollout.forced_lens[i]].any() for i in range(n))


def test_several_samples_share_one_reading_of_the_prompt(model):
    prompts = ragged_prompts(3, seed=8)
    rollout = generate(model, prompts, 10, (), num_samples=4, generator=torch.Generator().manual_seed(5))
    repeated = [p for p in prompts for _ in range(4)]
    check(rollout, repeated, 10, (), naive(model, repeated, 10, ()))
    assert rollout.prefilled == sum(map(len, prompts)) and rollout.decoded == 12 * 9


def test_a_rows_noise_is_its_own(model):
    """Not a matter of who else is there, of the slots, or of the cap; and a row can be drawn again alone."""
    prompts, seeds = ragged_prompts(6, seed=2), [11, 22, 33, 44, 55, 66]
    together = generate(model, prompts, 30, (5, 6), seeds=seeds)
    for i in (0, 3, 5):
        assert generate(model, [prompts[i]], 30, (5, 6), seeds=[seeds[i]]).response(0) == together.response(i)
    shorter = generate(model, prompts, 7, (5, 6), seeds=seeds, slots=2)
    assert all(shorter.response(i) == together.response(i)[:7] for i in range(6))
    one, six = (generate(model, prompts[:n], 9, (), generator=torch.Generator().manual_seed(1)) for n in (1, 6))
    assert one.response(0) == six.response(0)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_greedy_equals_transformers_generate(family, tmp_path):
    live(FAMILIES[family], seed=2).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt in ragged_prompts(4, seed=9):
        ours = generate(Transformer.from_pretrained(tmp_path), [prompt], 25, (7, 8), temperature=0.0).response(0)
        theirs = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=25,
            do_sample=False, eos_token_id=[7, 8], pad_token_id=0,
        )
        assert ours == theirs[0, len(prompt) :].tolist()


def test_frequencies_follow_the_models_probabilities(model):
    """Chi-square of the third token of 8,000 samples, given nothing but the prompt, against the exact marginal: all
    40 x 40 ways of getting there. 39 degrees of freedom, the 99.9% point is 72.1."""
    prompt, n = [1, 2, 3], 8000
    rollout = generate(model, [prompt], 3, (), num_samples=n, generator=torch.Generator().manual_seed(0), slots=3000)

    def next_p(rows):
        return (model(torch.tensor(rows))[:, -1] @ model.head.T).softmax(-1)

    p1 = next_p([prompt])[0]
    p2 = next_p([[*prompt, a] for a in range(40)])
    p3 = next_p([[*prompt, a, b] for a in range(40) for b in range(40)]).view(40, 40, 40)
    p = torch.einsum("a,ab,abc->c", p1, p2, p3)
    counts = torch.bincount(rollout.tokens[:, 5], minlength=40)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 72.1


def test_the_cache_is_as_long_as_needed_and_its_size_is_foretold(model, monkeypatch):
    made = []
    monkeypatch.setattr("sample.KVCache", lambda *a: made.append(KVCache(*a)) or made[-1])
    prompts = ragged_prompts(6)
    generate(model, prompts, 20, (), slots=4)
    longest, main = max(map(len, prompts)), made[0]
    assert main.kv.shape == (2, 4, 4, longest + 20, 8)
    logits = 40 * (8 + 3 * 8)
    assert slot_bytes(model, longest + 20, 40) * 4 == main.kv.nbytes + 4 * logits
    assert slots_for(model, 32, 40, memory_budget=10 * slot_bytes(model, 32, 40) + 1) == 10
    assert slots_for(model, 32, 40, memory_budget=1) == 1


def test_out_of_memory_halves_the_slots_and_loses_nothing(model, monkeypatch, capsys):
    prompts = ragged_prompts(9)
    expected = generate(model, prompts, 20, (3, 4), generator=torch.Generator().manual_seed(5))
    forward, calls, ended = Decoder.__call__, [], []

    def forgetful(self, tokens, *args, **kwargs):
        calls.append(len(tokens))
        if len(tokens) > 2 and len(calls) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Decoder, "__call__", forgetful)
    rollout = generate(model, prompts, 20, (3, 4), generator=torch.Generator().manual_seed(5), slots=8,
                       stream=lambda i, token: ended.append(i) if token in (3, 4) else None)  # fmt: skip
    assert torch.equal(rollout.tokens, expected.tokens) and torch.equal(rollout.finished, expected.finished)
    assert "rows go on in 4 slots" in (said := capsys.readouterr().err) and "in 2 slots" in said
    assert len(ended) == len(set(ended)), "a row that had ended was sampled again"
    monkeypatch.setattr(Decoder, "__call__", lambda *a, **k: torch.zeros(1).view(5))  # any other error goes through
    with pytest.raises(RuntimeError, match="shape"):
        generate(model, prompts, 20, (3, 4), slots=8)


def test_without_room_for_a_copy_the_model_itself_decodes(model, monkeypatch):
    def run():
        return generate(model, ragged_prompts(5), 12, (3,), generator=torch.Generator().manual_seed(5))

    made, build = [], Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda *a: made.append(1) or build(*a))
    expected, size = run(), sum(p.nbytes for p in model.parameters())
    assert made == [1]
    monkeypatch.setattr("sample.free_memory", lambda device: 4 * size - 1)
    assert torch.equal(run().tokens, expected.tokens) and made == [1]


def test_compiling_makes_few_graphs(monkeypatch):
    """Prompts of another length, or a longer response, must not compile the model again and again: there is a limit,
    beyond which torch computes as if nothing had been asked."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, compiled = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, mode, dynamic: compiled(m, backend=counter, dynamic=dynamic))
    model, counts = live(CONFIG, seed=0), []
    for longest in (3, 9, 20, 31, 40):
        generate(model, [[5] * longest, [6]], 200, (), generator=torch.Generator().manual_seed(5), compile=True)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert 1 <= counts[-1] <= 4, counts  # extents 128 and 256, all of one cache


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_the_compiled_decode_step_is_equal():
    prompts = ragged_prompts(5, seed=4)
    model = live(Qwen3Config(**{**CONFIG.to_dict(), "num_hidden_layers": 1, "layer_types": None}), seed=0).double()
    plain, compiled = (
        generate(model, prompts, 14, (3,), generator=torch.Generator().manual_seed(5), slots=3, compile=c)
        for c in (False, True)
    )
    assert torch.equal(plain.tokens, compiled.tokens)
    assert torch.allclose(plain.logprobs, compiled.logprobs, atol=1e-6)


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
    assert torch.allclose(logprobs.float(), p.log()[tokens], atol=1e-5)


@pytest.mark.parametrize("v", [1, 5, 255, 256, 257, 3000])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(v):
    """Whatever the vocabulary's size against the blocks it is searched in."""
    g = torch.Generator().manual_seed(v)
    logits = 3 * torch.randn(v, generator=g, dtype=torch.float64)
    u = torch.rand(2000, generator=g, dtype=torch.float64)
    tokens, logprobs = draw(logits.expand(2000, v), u, 0.7)
    p = (logits / 0.7).softmax(-1)
    assert torch.equal(tokens, (p.cumsum(-1) <= u[:, None]).sum(-1).clamp(max=v - 1))
    assert torch.allclose(logprobs, p.log()[tokens], atol=1e-12)


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    """150,000 tokens that share 1% of the mass, in float32: where a float32 cumulative sum goes wrong."""
    logits = torch.full((150_000,), math.log(0.01 / 149_999))
    logits[0] = math.log(0.99)
    u = torch.linspace(0.99, 1, 2001, dtype=torch.float64)[:-1]
    tokens = torch.cat([draw(logits.expand(100, -1), part, 1.0)[0] for part in u.split(100)])
    expected = ((u - 0.99) / 0.01 * 149_999).floor() + 1
    assert (tokens - expected).abs().max() < 30  # float32 probabilities; a float32 sum is off by thousands


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
    assert set(draw(logits, u, 1.0, min_p=0.55)[0].tolist()) == {0}
    assert set(draw(logits, u, 1.0, min_p=0.45)[0].tolist()) == {0, 1}


def test_attended_pairs_are_counted(model):
    rollout = generate(model, [[1, 2, 3], [4]], 3, (), temperature=0.0)
    assert rollout.pairs == (1 + 2 + 3) + (4 + 5) + (1) + (2 + 3)  # prefill triangle, then two decoded tokens a row
    assert rollout.prefilled == 3 + 1 and rollout.decoded == 2 + 2


def test_unusable_arguments_are_named(model):
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], 5, ())
    with pytest.raises(ValueError, match="max_new_tokens and num_samples must be at least 1"):
        generate(model, [[1]], 0, ())
    with pytest.raises(ValueError, match="seeds has 1 entries for 2 rows"):
        generate(model, [[1]], 5, (), seeds=[1], num_samples=2)
