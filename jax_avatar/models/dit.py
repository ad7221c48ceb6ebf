"""The causal speech-to-video transformer of Live Avatar (Wan2.2-S2V), in five forms.

    bidirectional   whole clip, everything sees everything      teacher, base model
    block_causal    whole clip, a block sees itself and earlier ones      training
    prefill         reference and motion tokens -> sink         once per stream
    stream_block    one block against its cache                 every tick
    block_after     the same, past given layer by layer         distillation

All forms run the same layers. The network predicts the velocity `noise - clean`.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.models.attention import Attention, attend, block_causal_mask
from jax_avatar.models.cache import BlockPosition, KVCache, Sink
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.layers import (
    LayerNorm,
    PatchProjection,
    TimeEmbedding,
    layer_at,
    layer_norm,
    linear,
    modulate,
    stack_layers,
    unpatchify,
)
from jax_avatar.models.quantise import projection
from jax_avatar.models.rope import (
    Rotation,
    concat,
    frame_rotation,
    grid_rotation,
    motion_positions,
    rotate,
)
from jax_avatar.models.sharding import constrain, gathered
from jax_avatar.models.speech.tokens import (
    AUDIO_CONTEXTS,
    EARLIER_FRAMES,
    AudioInjector,
    AudioTokens,
    CausalAudioEncoder,
)
from jax_avatar.shapes import (
    Array,
    Float,
    Int,
    IntScalar,
    Latent,
    TextStates,
    Tokens,
)

__all__ = ["LAST_FRAME", "MOTION_LATENTS", "DiT"]

LAST_FRAME = 2047
"""Last rotary frame at which a latent or the reference may stand in `block_causal`."""

MOTION_LATENTS = 19
"""Latents before a clip that the motion packer sees: 73 video frames."""

Tap = Callable[[str, Array], None] | None
Past = Callable[[Array], tuple[Array, Array]]
Frame = Int[Array, " b"] | IntScalar

_PATCH = (1, 2, 2)
_NOISY, _REFERENCE, _MOTION = 0, 1, 2  # rows of the token-kind embedding
_MOTION_FRAMES = (16, 2, 1)  # far, mid, near latent frames of the motion clip
_FIRST_FRAME = -MOTION_LATENTS


class Block(nnx.Module):
    """Self-attention, cross-attention to the prompt and feed-forward, modulated by time."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        d = config.width
        self.config = config
        self.modulation = nnx.Param(
            jax.random.normal(rngs.params(), (6, d), config.param_dtype) / np.sqrt(d)
        )
        self.self_attention = Attention(config, rngs=rngs)
        self.cross_attention = Attention(config, rngs=rngs)
        self.norm_cross = LayerNorm(d, config.eps, config.param_dtype)
        self.ffn_in = projection(config, d, config.ffn_width, rngs=rngs)
        self.ffn_out = projection(config, config.ffn_width, d, rngs=rngs)

    def __call__(self, x, time_rows, spread, self_attention, text_key, text_value, tap=None):
        """One layer.

        Args:
            x: hidden states `[b n d]`.
            time_rows: modulation rows of the timesteps, `[b r 6 d]`.
            spread: `[b r d] -> [b n d]`, the row of every token.
            self_attention: `(query, key, value) -> (seen, carry)` with positions and cache.
            text_key, text_value: of the prompt, `[b p m e]`.
            tap: called with names and intermediate values.

        Returns:
            New hidden states, and the carry.
        """
        tap = tap or (lambda name, value: None)
        dtype, eps = x.dtype, self.config.eps
        rows = self.modulation[...].astype(jnp.float32)[None, None] + time_rows
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            spread(rows[:, :, i]) for i in range(6)
        )

        attended = modulate(layer_norm(x, eps), shift, scale).astype(dtype)
        tap("selfattn_in", attended)
        attention = self.self_attention
        query = attention.project_query(attended)
        seen, carry = self_attention(query, *attention.project_key_value(attended))
        seen = attention.project_out(seen)
        tap("selfattn_out", seen)
        # Inside a layer the residual is float32, as in the official run.
        x = x.astype(jnp.float32) + gate * seen.astype(jnp.float32)

        prompted = self.norm_cross(x.astype(dtype))
        tap("crossattn_in", prompted)
        attention = self.cross_attention
        kernel = self.config.attention
        prompted = attend(attention.project_query(prompted), text_key, text_value, kernel=kernel)
        prompted = attention.project_out(prompted)
        tap("crossattn_out", prompted)
        x = x + prompted.astype(jnp.float32)

        hidden = modulate(layer_norm(x, eps), ffn_shift, ffn_scale).astype(dtype)
        tap("ffn_in", hidden)
        hidden = constrain(self.ffn_in(hidden), ..., None, "model")
        hidden = self.ffn_out(jax.nn.gelu(hidden, approximate=True))
        tap("ffn_out", hidden)
        x = (x + ffn_gate * hidden.astype(jnp.float32)).astype(dtype)
        tap("out", x)
        return x, carry


class DiT(nnx.Module):
    """Latent block, timestep, speech, prompt and portrait -> velocity."""

    smallest_sigma: ClassVar[float] = 0.0
    """Noise level below which the velocity is no longer `noise - clean` of the prediction."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        d, c = config.width, config.latent_channels
        self.config = config
        self.patch = PatchProjection(config, c, _PATCH, rngs=rngs)
        self.pose = PatchProjection(
            config, config.pose_channels, _PATCH, zero=config.zero_init, rngs=rngs
        )
        if config.framepack:
            self.motion_near = PatchProjection(config, c, (1, 2, 2), rngs=rngs)
            self.motion_mid = PatchProjection(config, c, (2, 4, 4), rngs=rngs)
            self.motion_far = PatchProjection(config, c, (4, 8, 8), rngs=rngs)
        kinds = (3, d)
        self.token_kind = nnx.Param(
            jnp.zeros(kinds, config.param_dtype)
            if config.zero_init
            else 0.02 * jax.random.normal(rngs.params(), kinds, config.param_dtype)
        )
        normal = nnx.initializers.normal(0.02)
        self.text_in = linear(config, config.text_width, d, init=normal, rngs=rngs)
        self.text_out = linear(config, d, d, init=normal, rngs=rngs)
        self.time = TimeEmbedding(config, rngs=rngs)
        self.audio = CausalAudioEncoder(config, rngs=rngs)
        self.blocks = stack_layers(lambda r: Block(config, rngs=r), config.num_layers, rngs)
        self.injectors = stack_layers(
            lambda r: AudioInjector(config, rngs=r), len(config.audio_inject_layers), rngs
        )
        self.head_modulation = nnx.Param(
            jax.random.normal(rngs.params(), (2, d), config.param_dtype) / np.sqrt(d)
        )
        outputs = int(np.prod(_PATCH)) * c
        self.head = linear(config, d, outputs, dtype=jnp.float32, zero=True, rngs=rngs)

    # ---- the five forms -------------------------------------------------------------------

    def bidirectional(
        self,
        noisy: Latent,
        timestep: Float[Array, "b t"],
        conditions: Conditions,
        *,
        tap: Tap = None,
    ) -> Latent:
        """Velocity of a whole clip in which every token sees every other.

        The audio encoder hears the clip as one: its context is "clip".

        Args:
            noisy: noisy latents.
            timestep: 0..1000 per latent frame.
            conditions: of the clip.
            tap: called with names and intermediate values.

        Source: Wan2.2-S2V (arXiv 2508.18621).
        """
        frames = (0, self.config.reference_frame)
        return self._clip(noisy, timestep, conditions, frames, "clip", is_causal=False, tap=tap)

    def block_causal(
        self,
        noisy: Latent,
        timestep: Float[Array, "b t"],
        conditions: Conditions,
        *,
        first_frame: Frame = 0,
        reference_frame: Frame | None = None,
        past_blocks: int | None = None,
        audio_context: str = "block_reset",
        tap: Tap = None,
    ) -> Latent:
        """Velocity of a whole clip in block-causal form: a block attends to itself, past and sink.

        Args:
            noisy: noisy latents.
            timestep: 0..1000 per latent frame, equal inside a block.
            conditions: of the clip.
            first_frame: rotary frame of the first latent, of all clips or of each.
            reference_frame: rotary frame of the reference, likewise; where it does not roll if
                not given. No frame may be beyond `LAST_FRAME`.
            past_blocks: earlier blocks that a block sees; all if not given. A stream sees
                `ring_blocks - 1`.
            audio_context: what the audio encoder hears before a block: "block_reset", nothing, as
                in a stream, or "clip", all that the clip has, as in the released training code.
            tap: called with names and intermediate values.

        Source: Live Avatar (arXiv 2512.04677), block-wise diffusion forcing.
        """
        if audio_context not in AUDIO_CONTEXTS:
            raise ValueError(
                f"audio_context {audio_context!r} must be one of {', '.join(AUDIO_CONTEXTS)}."
            )
        if reference_frame is None:
            reference_frame = self.config.reference_frame
        return self._clip(
            *(noisy, timestep, conditions, (first_frame, reference_frame), audio_context),
            is_causal=True,
            past_blocks=past_blocks,
            tap=tap,
        )

    def prefill(self, conditions: Conditions, *, tap: Tap = None) -> Sink:
        """Keys and values of the reference and motion tokens, seen by every block of a stream.

        Args:
            conditions: prompt, reference and motion count. Motion is zero frames if None and the
                network has the motion packer, so that the sink keeps its size.
            tap: called with names and intermediate values.
        """
        reference, motion = conditions.reference, conditions.motion
        b = reference.shape[0]
        if motion is None and self.config.framepack:
            motion = jnp.zeros((b, 1, *reference.shape[2:]), reference.dtype)
        x = self._cond_tokens(reference, motion)
        rotation = self._cond_rotation(
            reference.shape[2:4], self._reference_rotation(half=True), motion is not None, half=True
        )
        _, time_rows = self.time(jnp.zeros((b, 1), jnp.float32))
        if tap:
            tap("rope_cos", rotation.cos)
            tap("rope_sin", rotation.sin)
            tap("time_e", self.time(jnp.zeros((b, 1), jnp.float32))[0])
        n = x.shape[1]

        def spread(row):
            return jnp.broadcast_to(row, (b, n, row.shape[-1]))

        def layer(x, block, index, xs, carry, tap):
            def self_attention(query, key, value):
                seen = attend(
                    rotate(query, rotation),
                    rotate(key, rotation),
                    value,
                    kernel=self.config.attention,
                )
                return seen, (key, value)

            text_kv = xs
            x, kept = block(x, time_rows, spread, self_attention, *text_kv, tap=tap)
            return x, carry, kept

        text_kv = self._text_kv(conditions.text, tap)
        _, _, (key, value) = self._layers(x, layer, text_kv, None, tap=tap)
        return Sink(key, value, *text_kv)

    def stream_block(
        self,
        noisy: Latent,
        timestep: Float[Array, "b t"],
        conditions: Conditions,
        cache: KVCache,
        sink: Sink,
        position: BlockPosition,
        *,
        tap: Tap = None,
    ) -> tuple[Latent, KVCache]:
        """Velocity of one block of a stream.

        The block's keys and values enter the window before it attends, so it sees itself.

        Args:
            noisy: the block at its noise level.
            timestep: 0..1000 per latent frame.
            conditions: of the block: pose, speech features and speaker mask count; prompt,
                reference and motion are in the sink. Features may begin `EARLIER_FRAMES` before
                the block, which are then heard, too (audio context "clip").
            cache: window of this denoising step.
            sink: from `prefill`.
            position: where the block stands, from `block_position`.
            tap: called with names and intermediate values.

        Returns:
            The velocity, and the window with this block in it.
        """
        n = self._tokens(noisy)
        num_cond = sink.key.shape[2]
        window = position.slot * n + num_cond
        length = num_cond + position.filled * n

        def look(query, own, cond, index, carry):
            keys = _write(carry[0], cond[0], index, 0)
            keys = _write(keys, own[0], index, window)
            values = _write(carry[1], cond[1], index, 0)
            values = _write(values, own[1], index, window)
            seen = attend(
                query,
                keys[index],
                values[index],
                key_length=length,
                kernel=self.config.attention,
            )
            return seen, (keys, values), None

        carry = (cache.key, cache.value)
        velocity, (key, value), _ = self._one_block(
            noisy, timestep, conditions, sink, position, look, carry, tap
        )
        return velocity, KVCache(key, value)

    def block_after(
        self,
        noisy: Latent,
        timestep: Float[Array, "b t"],
        conditions: Conditions,
        past: Past,
        sink: Sink,
        position: BlockPosition,
    ) -> tuple[Latent, KVCache]:
        """Velocity of one block whose past is given layer by layer, to differentiate through.

        `stream_block` carries its window through the layers, of which a gradient would keep one
        copy per layer; this form only reads.

        Args:
            noisy: the block at its noise level.
            timestep: 0..1000 per latent frame.
            conditions: as in `stream_block`.
            past: layer number -> keys and values of earlier blocks, `[b s m e]` each, filled ones
                first; there are `position.filled - 1` of them.
            sink: from `prefill`.
            position: where the block stands; its slot does not matter.

        Returns:
            The velocity, and the block's own keys and values, `[l b n m e]`.
        """
        n = self._tokens(noisy)
        length = sink.key.shape[2] + position.filled * n

        def look(query, own, cond, index, carry):
            key, value = (
                jnp.concatenate([c, o, p.astype(o.dtype)], axis=1)
                for c, o, p in zip(cond, own, past(index), strict=True)
            )
            seen = attend(query, key, value, key_length=length, kernel=self.config.attention)
            return seen, carry, own

        velocity, _, (key, value) = self._one_block(
            noisy, timestep, conditions, sink, position, look, None, None
        )
        return velocity, KVCache(key, value)

    def project_prompt(self, text: TextStates) -> tuple[Array, Array]:
        """Keys and values of the prompt for all layers, `[l b p m e]`, as in the sink."""
        return self._text_kv(text)

    # ---- parts ----------------------------------------------------------------------------

    def _clip(
        self, noisy, timestep, conditions, frames, audio_context, *, is_causal, past_blocks=None,
        tap,
    ):  # fmt: skip
        """A whole clip; `frames` are those of its first latent and of the reference."""
        config = self.config
        b, t, h, w, _ = noisy.shape
        half = config.half_rotary and is_causal
        pose, has_motion = self._pose_of(conditions, t), conditions.motion is not None
        cond = self._cond_tokens(conditions.reference, conditions.motion, tap)
        noisy_tokens = self._noisy_tokens(noisy, pose, tap)
        x = jnp.concatenate([noisy_tokens, cond], axis=1)
        n, num_cond = noisy_tokens.shape[1], cond.shape[1]

        # Conditioning tokens are clean: they are modulated with timestep 0.
        with_zero = jnp.concatenate([timestep, jnp.zeros((b, 1), timestep.dtype)], axis=1)
        embedding, time_rows = self._time(with_zero, tap)
        rotation = self._clip_rotation((t, h, w), *frames, has_motion, half=half)
        if tap:
            tap("rope_cos", rotation.cos)
            tap("rope_sin", rotation.sin)
        mask = None
        if is_causal:
            mask = block_causal_mask(n, num_cond, config.frames_per_block * n // t, past_blocks)
        spread_noisy = _spread_frames(t, n)

        def spread(rows):
            clean = jnp.broadcast_to(rows[:, t:], (b, num_cond, rows.shape[-1]))
            return jnp.concatenate([spread_noisy(rows[:, :t]), clean], axis=1)

        def self_attention(query, key, value):
            seen = attend(
                rotate(query, rotation),
                rotate(key, rotation),
                value,
                mask=mask,
                kernel=config.attention,
            )
            return seen, None

        tokens = self._audio_tokens(conditions.audio, t, audio_context, tap)
        inject = self._injection(tokens, conditions.speaker_mask, tap)

        def layer(x, block, index, xs, carry, tap):
            x, _ = block(x, time_rows, spread, self_attention, *xs, tap=tap)
            x = jnp.concatenate([inject(x[:, :n], index), x[:, n:]], axis=1)
            if tap:
                tap("after_audio", x)
            return x, carry, None

        x, _, _ = self._layers(x, layer, self._text_kv(conditions.text, tap), None, tap=tap)
        out = self.apply_head(x[:, :n], embedding[:, :t], (t, h, w), tap)
        return self.velocity(out, noisy, timestep, pose)

    def _one_block(self, noisy, timestep, conditions, sink, position, look, carry, tap):
        """One block of a stream; `look` decides what it sees.

        `look(query, own, cond, layer, carry) -> (seen, carry, kept)`: `own` and `cond` are keys,
        rotated, and values of the block and of the sink.
        """
        half = self.config.half_rotary
        _, t, h, w, _ = noisy.shape
        embedding, time_rows = self._time(timestep, tap)
        pose = self._pose_of(conditions, t)
        x = self._noisy_tokens(noisy, pose, tap)
        own = self._grid_rotation(position.frame, h, w, half=half)
        has_motion = sink.key.shape[2] > (h // 2) * (w // 2)
        cond = self._cond_rotation((h, w), position.reference, has_motion, half=half)
        if tap:
            for name, rotation in (("noisy", own), ("cond", cond)):
                tap(f"rope_{name}_cos", rotation.cos)
                tap(f"rope_{name}_sin", rotation.sin)
        tokens = self._audio_tokens(conditions.audio, t, "clip", tap)
        inject = self._injection(tokens, conditions.speaker_mask, tap)
        spread = _spread_frames(t, x.shape[1])

        def layer(x, block, index, xs, carry, tap):
            sink_key, sink_value, text_key, text_value = xs

            def self_attention(query, key, value):
                seen, carried, kept = look(
                    rotate(query, own),
                    (rotate(key, own), value),
                    (rotate(sink_key, cond), sink_value),
                    index,
                    carry,
                )
                return seen, (carried, kept)

            x, (carry, kept) = block(
                x, time_rows, spread, self_attention, text_key, text_value, tap=tap
            )
            x = inject(x, index)
            if tap:
                tap("after_audio", x)
            return x, carry, kept

        xs = (sink.key, sink.value, sink.text_key, sink.text_value)
        x, carry, kept = self._layers(x, layer, xs, carry, tap=tap)
        out = self.apply_head(x, embedding, (t, h, w), tap)
        return self.velocity(out, noisy, timestep, pose), carry, kept

    def _tokens(self, noisy):
        return noisy.shape[1] * (noisy.shape[2] // 2) * (noisy.shape[3] // 2)

    def _layers(self, x, layer, xs, carry, *, tap):
        """Runs `layer(x, block, index, xs, carry, tap) -> (x, carry, kept)` over all layers."""
        graphdef, state = nnx.split(self.blocks)
        count = self.config.num_layers

        def body(through, inputs):
            x, carry = through
            index, state, xs = inputs
            # Between layers, tokens are spread over "model"; within, heads are.
            x = constrain(x, "data", "model")
            block = nnx.merge(graphdef, gathered(state, "blocks", count))
            x, carry, kept = layer(x, block, index, xs, carry, None)
            return (constrain(x, "data", "model"), carry), kept

        if tap is None:
            if self.config.rematerialise:
                body = jax.checkpoint(body)
            scanned = (jnp.arange(count), state, xs)
            (x, carry), kept = jax.lax.scan(body, (x, carry), scanned, unroll=self.config.unroll)
            return x, carry, kept

        tap("block0_in", x)
        kept = []
        for index in range(count):
            prefixes = [f"block{index}"] + ["block_last"] * (index == count - 1)

            def inner(name, value, prefixes=prefixes):
                for prefix in prefixes:
                    tap(f"{prefix}_{name}", value)

            block = nnx.merge(graphdef, layer_at(state, index))
            x, carry, here = layer(x, block, index, layer_at(xs, index), carry, inner)
            kept.append(here)
        return x, carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)

    def _audio_tokens(self, audio, t, context, tap) -> AudioTokens:
        """Audio tokens of `t` latent frames; features may begin `EARLIER_FRAMES` before them."""
        if audio.shape[2] - 4 * t not in (0, EARLIER_FRAMES):
            raise ValueError(
                f"audio features cover {audio.shape[2]} video frames; {t} latent frames need "
                f"{4 * t}, or {EARLIER_FRAMES} more before them. Pass four feature frames per "
                "latent frame."
            )
        if tap:
            # Other code keeps the outputs of the repeated history; make them for comparison.
            repeated = [audio[:, :, :1]] * self.config.audio_history
            local, overall = self.audio.encode(jnp.concatenate([*repeated, audio], axis=2))
            tap("audio_local", local)
            tap("audio_global", overall)
        encode = self.audio.by_block if context == "block_reset" else self.audio
        return jax.tree.map(lambda tokens: tokens[:, :, -t:], encode(audio))

    def _injection(self, tokens: AudioTokens, speaker_mask, tap):
        """Returns `(noisy tokens, layer index) -> noisy tokens` with the audio bound."""
        b, speakers, t = tokens[1].shape[:3]
        mask = None
        if speaker_mask is not None:
            mask = speaker_mask[:, :, :t].reshape(b, speakers, -1)
        elif speakers > 1:
            raise ValueError(
                f"audio features of {speakers} speakers came without a speaker mask; pass "
                "speaker_mask [b u t h/2 w/2] or the features of one speaker."
            )
        layers = self.config.audio_inject_layers
        count = self.config.num_layers
        slot_of_layer = [layers.index(i) if i in layers else -1 for i in range(count)]
        graphdef, state = nnx.split(self.injectors)

        def inject(x, index):
            if isinstance(index, int):  # layers are being visited one by one
                slot = slot_of_layer[index]
                if slot < 0:
                    return x

                def inner(name, value):
                    tap(f"injector{slot}_{name}", value)

                injector = nnx.merge(graphdef, layer_at(state, slot))
                return x + injector(x, tokens, mask, inner).astype(x.dtype)

            slot = jnp.asarray(slot_of_layer)[index]

            def added(x):
                own = gathered(layer_at(state, slot), "injectors", len(layers))
                injector = nnx.merge(graphdef, own)
                return x + injector(x, tokens, mask).astype(x.dtype)

            if min(slot_of_layer) >= 0:
                return added(x)
            return jax.lax.cond(slot >= 0, added, lambda x: x, x)

        return inject

    def _pose_of(self, conditions, t):
        """Pose latents of `t` frames; one frame holds for all."""
        pose = conditions.pose
        return jnp.broadcast_to(pose, (pose.shape[0], t, *pose.shape[2:]))

    def _noisy_tokens(self, noisy, pose, tap):
        h, w = noisy.shape[2:4]
        if h % 2 or w % 2:
            raise ValueError(f"latent grid {h}x{w} must be even both ways; change the video size.")
        dtype = self.config.dtype
        tokens, posed = self.patch(noisy.astype(dtype)), self.pose(pose.astype(dtype))
        if tap:
            tap("patch_embed_noisy", tokens)
            tap("cond_embed", posed)
        return tokens + posed + self._kind(_NOISY)

    def _cond_tokens(self, reference, motion, tap=None):
        dtype = self.config.dtype
        tokens = self.patch(reference.astype(dtype))
        if tap:
            tap("patch_embed_ref", tokens)
        parts = [tokens + self._kind(_REFERENCE)]
        if motion is not None:
            if not self.config.framepack:
                raise ValueError("motion latents came, but this DiT has framepack=False; pass None")
            parts += [p + self._kind(_MOTION) for p in self._motion_tokens(motion.astype(dtype))]
        return jnp.concatenate(parts, axis=1)

    def _motion_tokens(self, motion):
        """Near, mid and far motion frames, ever more coarsely packed (FramePack, 2504.12626)."""
        total = sum(_MOTION_FRAMES)
        missing = max(0, total - motion.shape[1])
        motion = jnp.pad(motion, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))[:, -total:]
        far, mid, near = jnp.split(motion, np.cumsum(_MOTION_FRAMES)[:-1], axis=1)
        return self.motion_near(near), self.motion_mid(mid), self.motion_far(far)

    def _kind(self, kind):
        return self.token_kind[...][kind].astype(self.config.dtype)[None, None]

    def _text_kv(self, text, tap=None):
        """Keys and values of the prompt for all layers, `[l b p m e]` each."""
        config = self.config
        rows = text.shape[1]
        if rows > config.text_len or text.shape[2] != config.text_width:
            raise ValueError(
                f"prompt states {tuple(text.shape)} do not fit: at most {config.text_len} rows of "
                f"{config.text_width} channels are expected."
            )
        # Padding goes through the MLP too: all rows are attended to, without a mask.
        padded = jnp.pad(text, ((0, 0), (0, config.text_len - rows), (0, 0)))
        hidden = jax.nn.gelu(self.text_in(padded.astype(config.dtype)), approximate=True)
        hidden = self.text_out(hidden)
        if tap:
            tap("text", hidden)
        graphdef, state = nnx.split(self.blocks.cross_attention)

        def project(_, state):
            state = gathered(state, "blocks/cross_attention", config.num_layers)
            return None, nnx.merge(graphdef, state).project_key_value(hidden)

        return jax.lax.scan(project, None, state)[1]

    def _time(self, timestep, tap):
        embedding, rows = self.time(timestep.astype(jnp.float32))
        if tap:
            tap("time_sinusoid", self.time.sinusoid(timestep.astype(jnp.float32)))
            tap("time_e", embedding)
            tap("time_e0", rows)
        return embedding, rows

    def apply_head(
        self,
        x: Tokens,
        embedding: Float[Array, "b t d"],
        shape: tuple[int, int, int],
        tap: Tap = None,
    ) -> Latent:
        """Hidden states of noisy tokens -> the network's output.

        Args:
            x: hidden states.
            embedding: of the timesteps, per latent frame.
            shape: latent frames, rows, columns.
            tap: called with names and intermediate values.
        """
        t, h, w = shape
        rows = self.head_modulation[...].astype(jnp.float32)
        spread = _spread_frames(t, x.shape[1])
        shift, scale = (spread(embedding + row[None, None]) for row in rows)
        out = self.head(modulate(layer_norm(x, self.config.eps), shift, scale))
        if tap:
            tap("head_out", out)
        return unpatchify(out, (t, h // 2, w // 2), _PATCH)

    @classmethod
    def check_level(cls, setting: str, sigma: float) -> None:
        """Refuses to ask for velocities below `smallest_sigma`.

        Args:
            setting: where the level comes from, for the message.
            sigma: smallest noise level that is asked for.

        Raises:
            ValueError: it is too small.
        """
        if sigma < cls.smallest_sigma:
            raise ValueError(
                f"{setting} asks {cls.__name__} for noise level {sigma:g}; its velocity is that of "
                f"its prediction from {cls.smallest_sigma:g} up. Give levels of "
                f"{cls.smallest_sigma:g} or more."
            )

    def velocity(
        self, out: Latent, noisy: Latent, timestep: Float[Array, "b t"], pose: Latent
    ) -> Latent:
        """The network's output -> velocity; here they are the same.

        Args:
            out: from `apply_head`.
            noisy: what the network was given.
            timestep: its noise level times 1000, per latent frame.
            pose: the pose input.
        """
        del timestep, pose
        return out.astype(noisy.dtype)

    def _grid_rotation(self, frames, h, w, *, half):
        return self._rotation(frames, range(h // 2), range(w // 2), half)

    def _reference_rotation(self, *, half):
        config = self.config
        return self._frame_rotation([config.reference_frame], half and config.half_rotary)

    def _clip_rotation(self, shape, first_frame, reference_frame, has_motion, *, half):
        """Of all tokens of a clip, `[n pairs]`, or `[b n pairs]` where clips stand apart."""
        t, h, w = shape
        table = self._frame_rotation(np.arange(_FIRST_FRAME, LAST_FRAME + 1), half)

        def turn(first, reference):
            def at(frames):
                return Rotation(*(jnp.asarray(part)[frames - _FIRST_FRAME] for part in table))

            noisy = self._grid_rotation(at(first + jnp.arange(t)), h, w, half=half)
            cond = self._cond_rotation(
                (h, w), at(reference[None]), has_motion, half=half,
                motion_at=lambda frames: at(first + jnp.asarray(frames)),
            )  # fmt: skip
            return concat([noisy, cond])

        places = jnp.broadcast_arrays(jnp.asarray(first_frame), jnp.asarray(reference_frame))
        return jax.vmap(turn)(*places) if places[0].ndim else turn(*places)

    def _cond_rotation(self, grid, reference, has_motion, *, half, motion_at=None):
        half = half and self.config.half_rotary
        motion_at = motion_at or (lambda frames: self._frame_rotation(frames, half))
        h, w = grid
        parts = [self._grid_rotation(reference, h, w, half=half)]
        for frames, rows, cols in motion_positions(h, w) if has_motion else ():
            if rows.size and cols.size:
                parts.append(self._rotation(motion_at(frames), rows, cols, half))
        return concat(parts)

    def _frame_rotation(self, frames, half):
        config = self.config
        return frame_rotation(frames, config.head_dim, theta=config.rope_theta, half=half)

    def _rotation(self, frames, rows, cols, half):
        config = self.config
        return grid_rotation(
            frames, rows, cols, config.head_dim, theta=config.rope_theta, half=half
        )


def _write(buffer, update, layer, slot):
    """Writes `[b n m e]` into slots of one layer of `[l b s m e]`, in place where XLA can."""
    zero = jnp.int32(0)
    starts = (jnp.int32(layer), zero, jnp.int32(slot), zero, zero)
    return jax.lax.dynamic_update_slice(buffer, update[None].astype(buffer.dtype), starts)


def _spread_frames(t: int, n: int):
    """`[b t d] -> [b n d]`: the row of a frame for each of its tokens."""

    def spread(rows):
        b, _, d = rows.shape
        return jnp.broadcast_to(rows[:, :, None], (b, t, n // t, d)).reshape(b, n, d)

    return spread
