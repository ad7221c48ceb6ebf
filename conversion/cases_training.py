"""Golden pieces of training: schedules, noise arithmetic, gradients, masks, optimisers.

Every file is known by the tensors in it. Latents in the files are `b t c h w`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conversion.cases import Case, Check, compare
from conversion.readers import SafetensorsFile
from jax_avatar.diffusion.flow import (
    add_noise,
    clean_from_velocity,
    noise_from_velocity,
    velocity_from_clean,
    velocity_toward,
)
from jax_avatar.diffusion.schedule import (
    euler_schedule,
    gaussian_weight,
    level_of_draw,
    shift_sigma,
)
from jax_avatar.diffusion.step import move
from jax_avatar.models.attention import block_causal_mask
from jax_avatar.models.cache import block_position, sink_frame
from jax_avatar.models.config import DiTConfig
from jax_avatar.training.dmd import (
    critic_loss,
    distillation_loss,
    generator_gradient,
    guide,
    score_level,
)
from jax_avatar.training.run.state import update_ema
from jax_avatar.training.run.step import LoopConfig, make_optimiser

__all__ = ["TrainingCases"]

Tensors = dict[str, np.ndarray]
_EPS = 1.2e-7  # of float32, in which both sides compute
_DETOUR = "loss_via_score_table"


class TrainingCases:
    """Closed-form numbers of the official training code."""

    name = "training"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """Files that have the tensors of one of the groups."""
        found = []
        for path in files:
            names = set(SafetensorsFile(path)) if path.suffix == ".safetensors" else set()
            for wanted, run in _GROUPS.items():
                if names >= set(wanted.split()):
                    found.append(Case(path.stem, (path,), run))
                    break
        return found

    def run(self, case: Case) -> Iterable[Check]:
        """Checks every tensor that is not an input; an unknown one fails."""
        tensors = dict(SafetensorsFile(case.files[0]))
        used = set()
        for check in case.data(tensors):
            used.add(check.tensor)
            yield check
        for name in tensors:
            if name not in used and not _INPUTS.fullmatch(name):
                yield Check(name, np.inf, 0.0, "no check covers this tensor")


_INPUTS = re.compile(
    r"(.*\.)?(t_raw|noise|x|fake|real|real_cond|real_uncond|v_pred|raw|p0|grads|sigma_from_to)"
    r"|t|x0|eps|v|block_start_frame|relative_dist"
    # What the official tables look up; we compute sigma.
    r"|.*\.sigma_lookup|.*\.sigma_lookup_table\d"
)


def _schedules(tensors: Tensors) -> Iterable[Check]:
    steps = np.arange(1000)
    made: dict[str, Any] = {}
    for name in tensors:
        group, _, kind = name.rpartition(".")
        if found := re.fullmatch(r"sf_shift(\d)", group):
            shift = float(found[1])
            sigma = level_of_draw(1000 - steps, shift)
            made = {
                "sigmas": (sigma, 2e-7),
                "timesteps": (1000 * sigma, 2e-4),
                "train_weights": (gaussian_weight(tensors[f"{group}.sigmas"], shift), 1e-6),
            }
            if kind.startswith("warp_"):
                draws = np.array([int(t) for t in kind.removeprefix("warp_").split("_")])
                made[kind] = (1000 * level_of_draw(draws, shift), 2e-4)
        elif found := re.fullmatch(r"diffusers_euler_shift3_n(\d+)", group):
            schedule = euler_schedule(int(found[1]))
            made = {
                "sigmas": (np.float32(schedule.sigmas), 3e-7),
                "timesteps": (np.float32(schedule.timesteps), 2e-4),
            }
        elif group == "diffsynth_default100_shift3":
            sigma = shift_sigma(np.linspace(1, 0.003 / 1.002, 100), 3.0)
            made = {"sigmas": (sigma, 2e-7), "timesteps": (1000 * sigma, 2e-4)}
        elif group == "wan22_unipc_shift3_n40":
            sigma = np.append(shift_sigma(np.linspace(0.999, 0, 41)[:-1], 3.0), 0)
            made = {
                "sigmas": (sigma, 2e-7),
                "timesteps": ((1000 * sigma[:-1]).astype(np.int64), 0.0),
            }
        if kind in made:
            value, tolerance = made[kind]
            yield compare(name, value, tensors[name], tolerance, _EPS if tolerance else 0.0)


def _noise_ops(tensors: Tensors) -> Iterable[Check]:
    clean, noise, velocity = (jnp.asarray(tensors[n])[:, None] for n in ("x0", "eps", "v"))
    sigma = jnp.asarray(tensors["t"]) / 1000

    def results(sigma):
        wide = sigma[:, None, None, None, None]
        noisy = add_noise(clean, noise, wide)
        return {
            "xt": noisy,
            "x0_from_v": clean_from_velocity(noisy, velocity, wide),
            "eps_from_v": noise_from_velocity(noisy, velocity, wide),
            "target_v": velocity_from_clean(clean, noise),
            "v_from_x0": velocity_toward(noisy, clean_from_velocity(noisy, velocity, wide), wide),
        }

    for name, value in results(sigma).items():
        key = f"exact.{name}" + ("" if name == "target_v" else "_f64")
        if key in tensors:
            yield compare(key, value[:, 0], tensors[key], 1e-6)
    for name in [n for n in tensors if n.endswith(".sigma_lookup")]:
        group, sigma = name.removesuffix(".sigma_lookup"), jnp.asarray(tensors[name])
        shift = float(group.removeprefix("table_shift"))
        for kind, value in results(sigma).items():
            if f"{group}.{kind}" in tensors:
                tolerance = 2e-5 if kind == "v_from_x0" else 3e-7
                expected = tensors[f"{group}.{kind}"]
                yield compare(f"{group}.{kind}", value[:, 0], expected, tolerance, _EPS)
        weight = f"{group}.train_weight"
        yield compare(weight, gaussian_weight(sigma, shift), tensors[weight], 1e-6, _EPS)
    for name in [n for n in tensors if n.endswith(".sigma_from_to")]:
        group, (start, end) = name.removesuffix(".sigma_from_to"), jnp.float32(tensors[name])
        noisy = add_noise(clean, noise, start)
        moved = {
            "euler_f64": move(noisy, velocity, start, end),
            "renoise_f64": move(noisy, velocity, start, end, noise[::-1]),
        }
        for kind, value in moved.items():
            yield compare(f"{group}.{kind}", value[:, 0], tensors[f"{group}.{kind}"], 1e-6)


def _dmd_timesteps(tensors: Tensors) -> Iterable[Check]:
    draw = jnp.asarray(tensors["raw"], jnp.int32)
    for name in tensors:
        if found := re.fullmatch(r"shift(\d)\.(noclamp|clamp20_980)", name):
            bounds = (0.0, 1.0) if found[2] == "noclamp" else (0.02, 0.98)
            made = 1000 * score_level(draw, float(found[1]), bounds)
            yield compare(name, made, tensors[name], 2e-4)


def _dmd(tensors: Tensors) -> Iterable[Check]:
    clean, noise = _latent(tensors["x"]), _latent(tensors["noise"])
    sigma = score_level(jnp.asarray(tensors["t_raw"], jnp.int32))
    cond, null = _latent(tensors["real_cond"]), _latent(tensors["real_uncond"])
    first = jnp.arange(clean.shape[1]) >= 3
    for case in ("base_w3", "nocfg_w0", "equal_w3", "masked_w3"):
        real = guide(cond, null, 1.0 + float(case[-1]))
        fake = real if case == "equal_w3" else _latent(tensors["fake"])
        mask = None
        if case == "masked_w3":
            mask = jnp.broadcast_to(first[None, :, None, None, None], clean.shape).astype(float)
        gradient = generator_gradient(clean, fake, real)
        loss, slope = jax.value_and_grad(distillation_loss)(clean, gradient, mask)
        made = {
            "t": (1000 * sigma, 2e-4),
            "noisy": (_official(add_noise(clean, noise, _wide(sigma))), 1e-6),
            "grad": (_official(gradient), 2e-6),
            "loss": (loss[None], 1e-7),
            "dloss_dx": (_official(slope), 1e-9),
            "mean_abs_grad": (jnp.mean(jnp.abs(gradient))[None], 2e-6),
        }
        for kind, (value, tolerance) in made.items():
            expected = tensors[f"{case}.{kind}"]
            yield compare(f"{case}.{kind}", value, expected, tolerance, _EPS)
    real, fake = guide(cond, null, 4.0), _latent(tensors["fake"])
    by_block = generator_gradient(clean, fake, real, normalizer="block")
    yield compare(
        "perblock_norm_w3.grad", _official(by_block), tensors["perblock_norm_w3.grad"], 2e-6
    )
    yield _zero_norm(clean, tensors)


def _zero_norm(clean: jax.Array, tensors: Tensors) -> Check:
    """Compares gradients; ours is bounded where the official one explodes."""
    name = "zero_norm.grad"
    expected = tensors[name]
    made = _official(
        generator_gradient(
            clean, _latent(tensors["zero_norm.fake"]), _latent(tensors["zero_norm.real"])
        )
    )
    exploded = np.abs(expected) > 1e30
    if not (np.isfinite(made).all() and np.abs(made).max() <= 10):
        return Check(name, np.inf, 10.0, "a zero distance must stay within the limit")
    kept = np.where(exploded, made, expected)
    check = compare(name, made, kept, 2e-6)
    return Check(name, check.error, check.tolerance, f"{exploded.sum()} explode officially")


def _critic(tensors: Tensors) -> Iterable[Check]:
    clean, noise = _latent(tensors["x"]), _latent(tensors["noise"])
    velocity = _latent(tensors["v_pred"])
    for case in [name.split(".")[0] for name in tensors if name.endswith(".t_raw")]:
        sigma = score_level(jnp.asarray(tensors[f"{case}.t_raw"], jnp.int32))
        # Clamped levels are in no table; the official noise is at the nearest entry.
        table = level_of_draw(jnp.arange(1, 1001), 5.0)
        nearest = table[jnp.argmin(jnp.abs(table[None, None] - sigma[..., None]), axis=-1)]
        is_clamped = (sigma <= 0.02) | (sigma >= 0.98)
        noisy = add_noise(clean, noise, _wide(jnp.where(is_clamped, nearest, sigma)))
        yield compare(f"{case}.t", 1000 * sigma, tensors[f"{case}.t"], 2e-4)
        yield compare(f"{case}.noisy", _official(noisy), tensors[f"{case}.noisy"], 1e-6)
        direct = tensors[f"{case}.loss_direct"]
        made = critic_loss(velocity, clean, noise)[None]
        yield compare(f"{case}.loss_direct", made, direct, 0.0, 1e-6)
        for name in tensors:
            if name.startswith(f"{case}.{_DETOUR}"):
                # The official detour through two tables; it may only add to the direct error.
                excess = max(0.0, float(direct[0] * (1 - 1e-4) - tensors[name][0]))
                yield Check(name, excess, 1e-4 * float(direct[0]), "official detour, not ours")


def _masks(tensors: Tensors) -> Iterable[Check]:
    for name, expected in tensors.items():
        form, sizes = name.split(".")[1:]
        size = {key: int(value) for key, value in re.findall(r"([a-z]+)(-?\d+)", sizes)}
        noisy, block = size["f"] * size["s"], size["b"] * size["s"]
        past = size["win"] // size["b"] - 1 if size.get("win", -1) > 0 else None
        if form == "i2v":  # a first block of one frame: the end of a longer mask
            missing = block - size["s"]
            made = block_causal_mask(noisy + missing, 0, block, past)[missing:, missing:]
        elif form == "teacherforcing":
            causal = block_causal_mask(noisy, 0, block)
            own = block_causal_mask(noisy, 0, block, 0)
            made = jnp.block([[causal, jnp.zeros_like(causal)], [causal & ~own, own]])
        else:
            made = block_causal_mask(noisy, size.get("cond", 0), block, past)
        yield compare(name, made, expected, 0.0)


def _sink(tensors: Tensors) -> Iterable[Check]:
    config = DiTConfig(8, 8, 1, 1)
    starts, distances = tensors["block_start_frame"], tensors["relative_dist"]
    traced = sink_frame(config, jnp.asarray(starts)[None], jnp.asarray(distances)[:, None])
    yield compare("sink_index", traced, tensors["sink_index"], 0.0)
    turned = block_position(config, int(starts[20]) // 3, int(distances[5])).reference
    frame = int(tensors["sink_index"][5, 20])
    at = block_position(config.replace(reference_frame=frame), 0, 0).reference
    yield compare("reference of a block", turned.cos, at.cos, 0.0)


def _optimisers(tensors: Tensors) -> Iterable[Check]:
    settings = {
        "gen": (1e-5, (0.0, 0.999), 10.0),
        "critic": (2e-6, (0.0, 0.999), 10.0),
        "stage1": (1e-5, (0.9, 0.999), 1.0),
    }
    for case, (rate, betas, clip) in settings.items():
        grads = tensors[f"{case}.grads"]
        loop = LoopConfig(
            num_steps=len(grads),
            learning_rate=rate,
            final_learning_rate=1.0,
            warmup_steps=0,
            weight_decay=0.01,
            betas=betas,
            max_grad_norm=clip,
        )
        optimiser = make_optimiser(loop)
        # As one row of a matrix, since vectors are not decayed.
        params = {"p": jnp.asarray(tensors[f"{case}.p0"])[None]}
        state, ema = optimiser.init(params), params
        rows: dict[str, list] = {"params": [], "ema099": [], "grad_norm_before_clip": []}
        for gradient in grads:
            gradient = {"p": jnp.asarray(gradient)[None]}
            rows["grad_norm_before_clip"].append(optax.global_norm(gradient))
            updates, state = optimiser.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            ema = update_ema(ema, params, 0.99)
            rows["params"].append(params["p"][0])
            rows["ema099"].append(ema["p"][0])
        for kind, values in rows.items():
            relative = 1e-6 if kind == "grad_norm_before_clip" else 0.0
            expected = tensors[f"{case}.{kind}"]
            # Three units in the last place of parameters between 2 and 4.
            yield compare(f"{case}.{kind}", jnp.stack(values), expected, 7.2e-7, relative)


def _latent(official: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(official), 2, -1)


def _official(latent: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(latent), -1, 2)


def _wide(sigma: jax.Array) -> jax.Array:
    return sigma[:, :, None, None, None]


_GROUPS: dict[str, Callable[[Tensors], Iterable[Check]]] = {
    "sf_shift5.sigmas": _schedules,
    "x0 eps v t exact.xt_f64": _noise_ops,
    "raw shift5.clamp20_980": _dmd_timesteps,
    "x fake real_cond real_uncond": _dmd,
    "x noise v_pred": _critic,
    "sf.teacherforcing.f6_s4_b3": _masks,
    "sink_index relative_dist": _sink,
    "gen.p0 critic.p0": _optimisers,
}
"""Tensors that give a file away -> how to make the others."""
