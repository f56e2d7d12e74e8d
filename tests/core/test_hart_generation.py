"""Drawing codes and residuals: filters, rounds, guidance, and the cache against recomputation."""

from itertools import pairwise

import pytest
import torch
from gesso_core.models.hart.config import HARTConfig
from gesso_core.models.hart.generation import (
    DrawOptions,
    ScaleInput,
    draw_scale,
    empty_cache,
    generate,
    guidance_ratio,
    round_sizes,
)
from gesso_core.models.hart.initialization import initialize_weights
from gesso_core.models.hart.noise_schedule import NoiseSchedule, variational_bits
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.residual_diffusion import ResidualDiffusion, initialize_residual
from gesso_core.models.hart.scale_noise import SeededNoise
from gesso_core.models.hart.transformer import HART, HARTText
from gesso_core.sampling.categorical import (
    draw_codes,
    filtered,
    gumbel_noise,
    top_k_filter,
    top_p_filter,
)
from torch import Tensor

CONFIG = HARTConfig(
    scales=(1, 2, 3, 4),
    vocabulary=64,
    latent_channels=8,
    context_tokens=6,
    context_channels=8,
    width=64,
    depth=2,
    heads=2,
    diffusion_width=32,
    diffusion_depth=1,
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hart() -> HART:
    generator = torch.Generator().manual_seed(0)
    model = HART(CONFIG)
    initialize_weights(model, generator)
    for parameter in model.parameters():  # heads that start silent get something to say
        if parameter.ndim > 1 and float(parameter.detach().abs().max()) < 1e-3:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def quantizer() -> MultiScaleQuantizer:
    torch.manual_seed(0)
    made = MultiScaleQuantizer(vocabulary=64, channels=8, scales=CONFIG.scales)
    return made.eval().requires_grad_(False)


def texts(model: HART, count: int) -> HARTText:
    mask = torch.arange(6) < torch.arange(2, 2 + count)[:, None]
    return model.encode_text(numbers(count, 6, 8, seed=5) * mask[..., None], mask)


@pytest.mark.parametrize("options", [DrawOptions(), DrawOptions(smooth=False, top_p=0.9)])
def test_the_cache_gives_the_codes_of_recomputation(
    hart: HART, quantizer: MultiScaleQuantizer, options: DrawOptions
) -> None:
    text = texts(hart, 3)
    cached, recomputed = (
        generate(
            hart, quantizer, text, seeds=[1, 2, 3], guidance=[3.0, 1.0, 0.0], options=options,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )  # fmt: skip
    for one, other in zip(cached.indices, recomputed.indices, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(cached.latent_BCHW, recomputed.latent_BCHW, atol=2e-4, rtol=1e-3)


def test_a_seed_gives_the_same_picture_alone_and_in_a_batch(
    hart: HART, quantizer: MultiScaleQuantizer
) -> None:
    text, guidance = texts(hart, 5), [0.5, 2.0, 4.0, 1.0, 3.0]
    batch = generate(hart, quantizer, text, seeds=range(5), guidance=guidance)
    for number in range(5):
        alone = generate(
            hart, quantizer, text.rows([number]), seeds=[number], guidance=[guidance[number]]
        )
        for one, all_of_them in zip(alone.indices, batch.indices, strict=True):
            assert torch.equal(one[0], all_of_them[number])
        torch.testing.assert_close(alone.latent_BCHW[0], batch.latent_BCHW[number])


def test_the_last_scale_keeps_the_strength_of_the_one_before() -> None:
    assert [guidance_ratio(s, 4) for s in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])
    assert guidance_ratio(1, 2) == 0.0


@pytest.mark.parametrize(("tokens", "rounds"), [(16, 1), (16, 2), (16, 4), (5, 5), (2, 2)])
def test_rounds_decide_every_token_once_and_more_towards_the_end(tokens: int, rounds: int) -> None:
    sizes = round_sizes(tokens, rounds)
    assert len(sizes) == rounds
    assert sum(sizes) == tokens
    assert min(sizes) >= 1


def test_two_rounds_fill_the_whole_last_scale(hart: HART, quantizer: MultiScaleQuantizer) -> None:
    text = texts(hart, 2)
    rows = HARTText.concatenate([text, hart.no_text(2)])
    cache = empty_cache(hart, 4)
    _, filled = hart.run(hart.text_slots(rows), hart.angles(rows, 0), rows, cache=cache)
    given = ScaleInput(
        scale=3,
        text=rows,
        latent_BCHW=numbers(2, 8, 4, 4),
        cache=filled,
        guidance_B=torch.tensor([2.0, 0.0]),
        noises=[SeededNoise(seed, 3) for seed in (1, 2)],
        kept=[None, None],
    )
    result = draw_scale(hart, quantizer, given, DrawOptions(rounds=2, smooth=False))
    places = torch.cat([drawn.places_BK for drawn in result.rounds], dim=1)
    assert [drawn.indices_BK.shape[1] for drawn in result.rounds] == [5, 11]
    assert torch.equal(places.sort(dim=1).values, torch.arange(16).expand(2, -1))
    gathered = result.indices_BN.gather(1, result.rounds[1].places_BK)
    assert torch.equal(gathered, result.rounds[1].indices_BK)
    assert result.cache is not None
    assert filled is not None
    assert result.cache.length == filled.length + 16


def test_kept_codes_are_taken_as_they_are(hart: HART, quantizer: MultiScaleQuantizer) -> None:
    text = texts(hart, 2)
    codes = torch.tensor([3, 1, 4, 1])
    given = ScaleInput(
        scale=1,
        text=text,
        latent_BCHW=torch.zeros(2, 8, 4, 4),
        cache=empty_cache(hart, 2),
        guidance_B=torch.zeros(2),
        noises=[SeededNoise(seed, 1) for seed in (1, 2)],
        kept=[codes, None],
    )
    result = draw_scale(hart, quantizer, given, DrawOptions())
    assert torch.equal(result.indices_BN[0], codes)
    alone = quantizer.contribution(1, quantizer.embed(codes[None]))
    torch.testing.assert_close(result.latent_BCHW[:1], alone)


def test_without_residual_the_latent_is_a_sum_of_codes(
    hart: HART, quantizer: MultiScaleQuantizer
) -> None:
    text = texts(hart, 2)
    options = DrawOptions(smooth=False, residual=False)
    drawn = generate(hart, quantizer, text, seeds=[1, 2], guidance=[2, 2], options=options)
    summed = quantizer.decode(drawn.indices, phi_at_last=False)
    torch.testing.assert_close(drawn.latent_BCHW, summed, atol=1e-5, rtol=1e-5)


def test_a_seed_draws_the_same_at_a_scale_whatever_came_before() -> None:
    once, again = SeededNoise(7, 2), SeededNoise(7, 2)
    assert torch.equal(once.uniform(9), again.uniform(9))
    assert not torch.equal(SeededNoise(7, 1).uniform(9), SeededNoise(7, 2).uniform(9))
    assert not torch.equal(SeededNoise(8, 2).uniform(9), SeededNoise(7, 2).uniform(9))


def test_the_best_k_stay_and_so_do_those_as_good() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert top_k_filter(logits, 2).isfinite().tolist() == [[False, True, True, True, False]]
    assert top_k_filter(logits, 0) is logits
    assert top_k_filter(logits, 600) is logits


def test_the_tail_of_the_probability_is_blocked_but_never_the_best() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert top_p_filter(logits, 0.7).isfinite().tolist() == [[True, True, False]]
    assert top_p_filter(logits, 1e-9).isfinite().tolist() == [[True, False, False]]
    assert top_p_filter(logits, 0.0) is logits


def test_draws_follow_the_probabilities_and_never_hit_a_blocked_code() -> None:
    logits = filtered(torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), top_k=3).expand(20_000, 4)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = draw_codes(logits, uniform).bincount(minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0, 2 / 9, 3 / 9, 4 / 9]), atol=0.02, rtol=0)
    edges = draw_codes(logits[:2], torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64))
    assert edges.tolist() == [1, 3]


def test_gumbel_noise_has_its_mean_and_is_finite_at_the_edges() -> None:
    noise = gumbel_noise(torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert gumbel_noise(torch.tensor([0.0, 1.0])).isfinite().all()


def test_the_drawing_steps_lie_at_equal_distances() -> None:
    schedule = NoiseSchedule.squared_cosine(1000).respaced(8)
    assert schedule.times == (0, 143, 285, 428, 571, 714, 856, 999)
    kept = NoiseSchedule.squared_cosine(1000).cumulative[list(schedule.times)]
    torch.testing.assert_close(schedule.cumulative, kept)
    assert all(b > a for a, b in pairwise(schedule.betas_T.tolist()))


@pytest.fixture(scope="module")
def residual() -> ResidualDiffusion:
    generator = torch.Generator().manual_seed(0)
    head = ResidualDiffusion(channels=4, condition=6, width=32, depth=1, steps=8)
    initialize_residual(head, generator)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return head.eval().requires_grad_(False)


def test_guidance_of_exactly_one_is_guidance_like_any_other(residual: ResidualDiffusion) -> None:
    condition, unconditional, start = numbers(3, 6), numbers(3, 6, seed=1), numbers(3, 4, seed=2)
    noise = numbers(8, 3, 4, seed=3)
    at, near, none = (
        residual.sample_guided(condition, unconditional, strength, start, noise.__getitem__)
        for strength in (1.0, 1.0001, 0.0)
    )
    torch.testing.assert_close(at, near, atol=1e-2, rtol=0)
    assert not torch.allclose(at, none, atol=1e-2)
    plain = residual.sample(condition, start, noise.__getitem__)
    torch.testing.assert_close(none, plain, atol=1e-5, rtol=1e-4)


def test_residuals_stay_within_their_range(residual: ResidualDiffusion) -> None:
    start, noise = 30 * numbers(3, 4), numbers(8, 3, 4)
    drawn = residual.sample(numbers(3, 6), start, noise.__getitem__, temperature=0.0)
    assert float(drawn.abs().max()) <= residual.residual_range * 1.001


def test_a_perfect_prediction_has_almost_no_loss() -> None:
    schedule = NoiseSchedule.squared_cosine(1000)
    clean, noise = numbers(5, 4) * 0.3, numbers(5, 4, seed=1)
    time = torch.tensor([1, 9, 99, 500, 998])
    noisy = schedule.noisy(clean, time, noise)
    exact = variational_bits(schedule, clean, noisy, time, noise, -torch.ones(5, 4))
    wrong = variational_bits(schedule, clean, noisy, time, noise + 1.0, -torch.ones(5, 4))
    assert float(exact.abs().max()) < 1e-3
    assert bool((wrong > exact).all())
