"""The causal speech-to-video transformer of Live Avatar (Wan2.2-S2V), in five forms.

    bidirectional   whole clip, everything sees everything      teacher, base model
    block_causal    whole clip, a block sees itself and earlier ones      training
    prefill         reference and motion tokens -> sink         once per stream
    stream_block    one block against its cache                 every tick
    block_after     the same, past given layer by layer         distillation

All forms run the same layers. The network predicts the velocity `noise - clean`.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.models.attention import attend, block_causal_mask
from jax_avatar.models.block import Block, run_layers
from jax_avatar.models.cache import BlockPosition, KVCache, Past, Sink, write
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.layers import (
    TimeEmbedding,
    layer_norm,
    linear,
    modulate,
    stack_layers,
    unpatchify,
)
from jax_avatar.models.rope import rotate
from jax_avatar.models.sharding import gathered
from jax_avatar.models.speech.injection import AudioInjector, make_injection
from jax_avatar.models.speech.tokens import AUDIO_CONTEXTS, CausalAudioEncoder
from jax_avatar.models.tap import tap
from jax_avatar.models.tokens import PATCH, TokenEmbedding, TokenPositions
from jax_avatar.shapes import Array, Float, Int, IntScalar, Latent, TextStates, Tokens

__all__ = ["DiT"]

Frame = Int[Array, " b"] | IntScalar


class DiT(TokenEmbedding):
    """Latent block, timestep, speech, prompt and portrait -> velocity."""

    smallest_sigma: ClassVar[float] = 0.0
    """Noise level below which the velocity is no longer `noise - clean` of the prediction."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d = config.width
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
        outputs = int(np.prod(PATCH)) * config.latent_channels
        self.head = linear(config, d, outputs, dtype=jnp.float32, zero=True, rngs=rngs)

    # ---- the five forms -------------------------------------------------------------------

    def bidirectional(
        self, noisy: Latent, timestep: Float[Array, "b t"], conditions: Conditions
    ) -> Latent:
        """Velocity of a whole clip in which every token sees every other.

        The audio encoder hears the clip as one: its context is "clip".

        Args:
            noisy: noisy latents.
            timestep: 0..1000 per latent frame.
            conditions: of the clip.

        Source: Wan2.2-S2V (arXiv 2508.18621).
        """
        frames = (0, self.config.reference_frame)
        return self._clip(noisy, timestep, conditions, frames, "clip", is_causal=False)

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
    ) -> Latent:
        """Velocity of a whole clip in block-causal form: a block attends to itself, past and sink.

        Args:
            noisy: noisy latents.
            timestep: 0..1000 per latent frame, equal inside a block.
            conditions: of the clip.
            first_frame: rotary frame of the first latent, of all clips or of each.
            reference_frame: rotary frame of the reference, likewise; where it does not roll if
                not given. No frame may be beyond `tokens.LAST_FRAME`.
            past_blocks: earlier blocks that a block sees; all if not given. A stream sees
                `ring_blocks - 1`.
            audio_context: what the audio encoder hears before a block: "block_reset", nothing, as
                in a stream, or "clip", all that the clip has, as in the released training code.

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
        )

    def prefill(self, conditions: Conditions) -> Sink:
        """Keys and values of the reference and motion tokens, seen by every block of a stream.

        Args:
            conditions: prompt, reference and motion count. Motion is zero frames if None and the
                network has the motion packer, so that the sink keeps its size.
        """
        config, reference, motion = self.config, conditions.reference, conditions.motion
        b, _, *grid, _ = reference.shape
        if motion is None and config.framepack:
            motion = jnp.zeros((b, 1, *reference.shape[2:]), reference.dtype)
        x, groups = self.sink_tokens(reference, motion), _groups(motion)
        positions = TokenPositions(config, tuple(grid), config.half_rotary)
        rotation = positions.sink(positions.along_time([config.reference_frame]), groups)
        embedding, time_rows = self.time(jnp.zeros((b, 1), jnp.float32))
        tap("rope_cos", rotation.cos)
        tap("rope_sin", rotation.sin)
        tap("time_e", embedding)
        n = x.shape[1]

        def spread(row):
            return jnp.broadcast_to(row, (b, n, row.shape[-1]))

        def self_attention(query, key, value):
            query, turned = rotate(query, rotation), rotate(key, rotation)
            return attend(query, turned, value, kernel=config.attention), (key, value)

        def layer(x, block, index, text_kv, carry):
            x, kept = block(x, time_rows, spread, self_attention, *text_kv)
            return x, carry, kept

        text_kv = self.project_prompt(conditions.text)
        _, _, (key, value) = run_layers(self.blocks, config, layer, x, text_kv)
        return Sink(key, value, *text_kv, groups)

    def stream_block(
        self,
        noisy: Latent,
        timestep: Float[Array, "b t"],
        conditions: Conditions,
        cache: KVCache,
        sink: Sink,
        position: BlockPosition,
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

        Returns:
            The velocity, and the window with this block in it.
        """
        n = _num_tokens(noisy)
        num_sink = sink.key.shape[2]
        window = position.slot * n + num_sink
        length = num_sink + position.filled * n

        def look(query, block_kv, sink_kv, index, carry):
            keys, values = (
                write(write(slots, of_sink, index), of_block, index, 0, window)
                for slots, of_sink, of_block in zip(carry, sink_kv, block_kv, strict=True)
            )
            key, value = keys[index], values[index]
            seen = attend(query, key, value, key_length=length, kernel=self.config.attention)
            return seen, (keys, values), None

        carry = (cache.key, cache.value)
        velocity, (key, value), _ = self._one_block(
            noisy, timestep, conditions, sink, position, look, carry
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
        n = _num_tokens(noisy)
        length = sink.key.shape[2] + position.filled * n

        def look(query, block_kv, sink_kv, index, carry):
            key, value = (
                jnp.concatenate([of_sink, of_block, of_past.astype(of_block.dtype)], axis=1)
                for of_sink, of_block, of_past in zip(sink_kv, block_kv, past(index), strict=True)
            )
            seen = attend(query, key, value, key_length=length, kernel=self.config.attention)
            return seen, carry, block_kv

        velocity, _, (key, value) = self._one_block(
            noisy, timestep, conditions, sink, position, look, None
        )
        return velocity, KVCache(key, value)

    def project_prompt(self, text: TextStates) -> tuple[Array, Array]:
        """Keys and values of the prompt for all layers, `[l b p m e]`, as in the sink.

        Raises:
            ValueError: the prompt does not fit.
        """
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
        tap("text", hidden)
        structure, state = nnx.split(self.blocks.cross_attention)

        def project(_, state):
            state = gathered(state, "blocks/cross_attention", config.num_layers)
            return None, nnx.merge(structure, state).project_key_value(hidden)

        return jax.lax.scan(project, None, state)[1]

    # ---- parts ----------------------------------------------------------------------------

    def _clip(
        self, noisy, timestep, conditions, frames, audio_context, *, is_causal, past_blocks=None
    ):
        """A whole clip; `frames` are those of its first latent and of the reference."""
        config, (b, t, h, w, _) = self.config, noisy.shape
        pose = self._pose_of(conditions, t)
        sink = self.sink_tokens(conditions.reference, conditions.motion)
        tokens = self.noisy_tokens(noisy, pose)
        x = jnp.concatenate([tokens, sink], axis=1)
        n, num_sink = tokens.shape[1], sink.shape[1]

        # Conditioning tokens are clean: they are modulated with timestep 0.
        with_zero = jnp.concatenate([timestep, jnp.zeros((b, 1), timestep.dtype)], axis=1)
        embedding, time_rows = self._time(with_zero)
        positions = TokenPositions(config, (h, w), config.half_rotary and is_causal)
        rotation = positions.clip(t, *frames, _groups(conditions.motion))
        tap("rope_cos", rotation.cos)
        tap("rope_sin", rotation.sin)
        mask = None
        if is_causal:
            mask = block_causal_mask(n, num_sink, config.frames_per_block * n // t, past_blocks)
        spread_noisy = _spread_frames(t, n)

        def spread(rows):
            clean = jnp.broadcast_to(rows[:, t:], (b, num_sink, rows.shape[-1]))
            return jnp.concatenate([spread_noisy(rows[:, :t]), clean], axis=1)

        def self_attention(query, key, value):
            query, key = rotate(query, rotation), rotate(key, rotation)
            return attend(query, key, value, mask=mask, kernel=config.attention), None

        inject = self._injection(conditions, t, audio_context)

        def layer(x, block, index, text_kv, carry):
            x, _ = block(x, time_rows, spread, self_attention, *text_kv)
            x = jnp.concatenate([inject(x[:, :n], index), x[:, n:]], axis=1)
            tap("after_audio", x)
            return x, carry, None

        text_kv = self.project_prompt(conditions.text)
        x, _, _ = run_layers(self.blocks, config, layer, x, text_kv)
        out = self.apply_head(x[:, :n], embedding[:, :t], (t, h, w))
        return self.velocity(out, noisy, timestep, pose)

    def _one_block(self, noisy, timestep, conditions, sink, position, look, carry):
        """One block of a stream; `look` decides what it sees.

        `look(query, block_kv, sink_kv, layer, carry) -> (seen, carry, kept)`: both are keys,
        rotated, and values.
        """
        config, (_, t, h, w, _) = self.config, noisy.shape
        embedding, time_rows = self._time(timestep)
        pose = self._pose_of(conditions, t)
        x = self.noisy_tokens(noisy, pose)
        positions = TokenPositions(config, (h, w), config.half_rotary)
        block_at = positions.frames(position.frame)
        sink_at = positions.sink(position.reference, sink.groups)
        for name, rotation in (("noisy", block_at), ("cond", sink_at)):
            tap(f"rope_{name}_cos", rotation.cos)
            tap(f"rope_{name}_sin", rotation.sin)
        inject = self._injection(conditions, t, "clip")
        spread = _spread_frames(t, x.shape[1])

        def layer(x, block, index, xs, carry):
            sink_key, sink_value, text_key, text_value = xs

            def self_attention(query, key, value):
                seen, carried, kept = look(
                    rotate(query, block_at),
                    (rotate(key, block_at), value),
                    (rotate(sink_key, sink_at), sink_value),
                    index,
                    carry,
                )
                return seen, (carried, kept)

            x, (carry, kept) = block(x, time_rows, spread, self_attention, text_key, text_value)
            x = inject(x, index)
            tap("after_audio", x)
            return x, carry, kept

        xs = (sink.key, sink.value, sink.text_key, sink.text_value)
        x, carry, kept = run_layers(self.blocks, config, layer, x, xs, carry)
        out = self.apply_head(x, embedding, (t, h, w))
        return self.velocity(out, noisy, timestep, pose), carry, kept

    def _injection(self, conditions, t, context):
        """Returns `(noisy tokens, layer index) -> noisy tokens` with the audio bound."""
        tokens = self.audio.of_frames(conditions.audio, t, context)
        return make_injection(self.injectors, self.config, tokens, conditions.speaker_mask)

    def _pose_of(self, conditions, t):
        """Pose latents of `t` frames; one frame holds for all."""
        pose = conditions.pose
        return jnp.broadcast_to(pose, (pose.shape[0], t, *pose.shape[2:]))

    def _time(self, timestep):
        embedding, rows = self.time(timestep.astype(jnp.float32))
        tap("time_e", embedding)
        tap("time_e0", rows)
        return embedding, rows

    def apply_head(
        self, x: Tokens, embedding: Float[Array, "b t d"], shape: tuple[int, int, int]
    ) -> Latent:
        """Hidden states of noisy tokens -> the network's output.

        Args:
            x: hidden states.
            embedding: of the timesteps, per latent frame.
            shape: latent frames, rows, columns.
        """
        t, h, w = shape
        rows = self.head_modulation[...].astype(jnp.float32)
        spread = _spread_frames(t, x.shape[1])
        shift, scale = (spread(embedding + row[None, None]) for row in rows)
        out = self.head(modulate(layer_norm(x, self.config.eps), shift, scale))
        tap("head_out", out)
        return unpatchify(out, (t, h // 2, w // 2), PATCH)

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


def _num_tokens(noisy: Latent) -> int:
    return noisy.shape[1] * (noisy.shape[2] // 2) * (noisy.shape[3] // 2)


def _groups(motion) -> tuple[str, ...]:
    return ("reference",) if motion is None else ("reference", "motion")


def _spread_frames(t: int, n: int):
    """`[b t d] -> [b n d]`: the row of a frame for each of its tokens."""

    def spread(rows):
        b, _, d = rows.shape
        return jnp.broadcast_to(rows[:, :, None], (b, t, n // t, d)).reshape(b, n, d)

    return spread
