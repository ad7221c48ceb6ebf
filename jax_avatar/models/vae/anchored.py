"""A video VAE anchored in the portrait: latents say what moves, the portrait how it looks.

    encode   4 frames, each beside the portrait -> curves of motion --linear--> latent
    prepare  portrait -> features, its surface, depth and own flow; what is behind it, filled in
    decode   latent --linear--> curves of motion
               turn and place of the head ---- inverse of the rigid head --+
               expression -- least squares + the portrait's own flow ------+-> coarse flow
               latent -> codes of 4 x 4 -> with the features to 16 x 16 ---+
             portrait warped by it, folded to 32 x 32 -> flow, mask, colour, outline
                    around eyes and mouth, to 64 x 64 -> finer flow, mask, colour
             head    = mask * (warp(portrait, flow) + shade) + (1 - mask) * colour
             picture = outline * head + (1 - outline) * backdrop

Latents are a fixed linear code of the curves, so they stay valid while the networks improve, and
data for a generator of latents need no pictures. They do not depend on each other: a stream
decodes them one by one with nothing but the prepared portrait. The networks see 128 pixels, the
warp runs at any size.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jax_avatar.models.vae import rigid_head
from jax_avatar.models.vae.interface import VideoVAE
from jax_avatar.models.vae.rigid_head import HeadShape
from jax_avatar.models.vae.warp import (
    doubled,
    enlarged,
    filled,
    fold,
    grid,
    packed,
    read,
    sharpened,
    shrunk,
    unfold,
    widened,
)
from jax_avatar.shapes import Latent, Video

__all__ = ["SIDE", "AnchoredVAE", "AnchoredVAEConfig", "Decoded", "PreparedPortrait"]

SIDE = 128
"""Pixels that the networks see, and the smallest side of a picture."""
FLOW = 64
"""Cells of the coarse flow."""
GROUP = 4
"""Frames of a latent after the first."""

_LARGEST = 2048  # pixels of a picture's side
_CODE = 4  # cells of the codes that a latent expands to
_POSE = 6  # yaw, pitch, roll; right, down, growth
_FACE = (slice(26, 62), slice(16, 48))  # of 64 x 64 cells: rows and columns of eyes and mouth
_EDGE = 2  # of 128 pixels
_LOGIT = 8.0  # bound of what the surface's network says


@dataclass(frozen=True)
class AnchoredVAEConfig:
    """Sizes, and what the curves of motion are.

    Attributes:
        curves: names of the curves, of which "yaw" and the five that follow are the head's.
        scale: by which they are divided.
        leading: names of the curves whose products move the flow, and whose effect differs most
            from person to person.
        latent_shape: rows, columns and channels of a latent.
        feature_widths: channels of the portrait's features at 32, 16, 8 and 4 cells.
        code_width: channels of the codes.
        flow_width: channels of the decoder at 16 cells.
        frame_width: channels of the decoder at 32 cells.
        face_width: channels of the decoder at 64 cells, around eyes and mouth.
        encoder_widths: channels of the encoder at 16, 8 and 4 cells.
        temporal_stride: frames per latent after the first; this network knows only 4.
    """

    curves: Sequence[str]
    scale: Sequence[float]
    leading: Sequence[str] = (
        "jawOpen", "mouthFunnel", "mouthPucker", "mouthSmileLeft", "mouthUpperUpLeft",
        "mouthLowerDownLeft", "mouthPressLeft", "eyeBlinkLeft", "eyeBlinkRight",
    )  # fmt: skip
    latent_shape: Sequence[int] = (2, 2, 12)
    feature_widths: Sequence[int] = (32, 48, 64, 64)
    code_width: int = 48
    flow_width: int = 64
    frame_width: int = 48
    face_width: int = 32
    encoder_widths: Sequence[int] = (48, 80, 128)
    temporal_stride: int = GROUP

    def __post_init__(self):
        for name, value in vars(self).copy().items():
            if name != "temporal_stride" and not isinstance(value, int):
                object.__setattr__(self, name, tuple(value))
        if self.temporal_stride != GROUP:
            raise ValueError(f"temporal_stride={self.temporal_stride}: this VAE knows only 4.")
        if len(self.scale) != len(self.curves) or "yaw" not in self.curves:
            raise ValueError(
                f"scale has {len(self.scale)} numbers for {len(self.curves)} curves, among them "
                "'yaw' and the five other values of the pose; give one for each."
            )
        if missing := sorted(set(self.leading) - set(self.curves)):
            raise ValueError(f"leading curves {missing} are none of {', '.join(self.curves)}.")

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""
        return self.latent_shape[2]

    @property
    def latent_size(self) -> int:
        """Numbers of a latent."""
        return int(np.prod(self.latent_shape))

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns, the same for pictures of all sizes.

        Args:
            height: pixel rows.
            width: pixel columns.

        Raises:
            ValueError: there are no such pictures, or no patches of a transformer in such latents.
        """
        if height != width or not SIDE <= height <= _LARGEST or height % 2:
            raise ValueError(
                f"{height}*{width} pixels: this VAE makes squares with even sides of {SIDE} to "
                f"{_LARGEST} pixels, such as 256*256."
            )
        rows, columns, _ = self.latent_shape
        if rows % 2 or columns % 2:
            raise ValueError(f"latents of {rows}x{columns} cells: transformers need even numbers.")
        return rows, columns

    @property
    def num_features(self) -> int:
        """Numbers that the mean flow is linear in."""
        return 1 + len(self.curves) - _POSE + len(self.leading) * (len(self.leading) + 1) // 2

    @property
    def pose_slice(self) -> slice:
        """Position of the head's turn and place among the curves."""
        first = self.curves.index("yaw")
        return slice(first, first + _POSE)

    def pose(self, curves: Float[Array, "... c"]) -> Float[Array, "... 6"]:
        """Turn and place of the head, in radians and shares of the picture."""
        part = self.pose_slice
        scale = jnp.asarray(self.scale[part], jnp.float32)
        return curves[..., part] * scale.reshape(*(1,) * (curves.ndim - 1), _POSE)

    def lead(self, curves: Float[Array, "... c"]) -> Float[Array, "... l"]:
        """The leading curves."""
        return curves[..., np.array([self.curves.index(name) for name in self.leading])]

    def features(self, curves: Float[Array, "... c"]) -> Float[Array, "... f"]:
        """Regressors of the mean expression's flow: 1, curves, products of leading ones."""
        lead, part = self.lead(curves), self.pose_slice
        first, second = np.triu_indices(len(self.leading))
        return jnp.concatenate(
            [
                jnp.ones_like(curves[..., :1]),
                curves[..., : part.start],
                curves[..., part.stop :],
                lead[..., first] * lead[..., second],
            ],
            -1,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, such that `AnchoredVAEConfig(**config.to_dict())` equals `config`."""
        return asdict(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreparedPortrait:
    """All that decoding needs of `b` portraits, the state of a stream; arrays, or their shapes."""

    features: dict[int, Any]  # cells -> b h w c
    own_flow: Any  # b 64 64 (l 2), flow per leading curve
    head: HeadShape  # 64 x 64
    surface: Any  # b 128 128 1, logit of the person's surface
    small: Any  # b 128 128 16, packed: portrait and surface
    full: Any  # b H W 16, the same, sharpened
    backdrop: Any  # b H W 3

    @property
    def side(self) -> int:
        """Edge of the pictures in pixels."""
        return self.full.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoded:
    """`f` pictures and their parts, for training."""

    picture: Array  # f H W 3
    flow: Array  # f 128 128 2, in widths
    coarse: Array  # f 64 64 2, before the fine residual
    mask: Array  # f H W 1, where the portrait shows what is there
    colour: Array  # f H W 3, what is painted elsewhere
    outline: Array  # f H W 1, logit of the person's surface


class MotionBasis(nnx.Module):
    """Constants: the linear code of the curves, and the mean person. Fitted, never trained."""

    def __init__(self, config: AnchoredVAEConfig):
        window, z = GROUP * len(config.curves), config.latent_size
        self.mean = nnx.Param(jnp.zeros(window))
        self.analysis = nnx.Param(jnp.zeros((window, z)))
        self.synthesis = nnx.Param(jnp.zeros((z, window)))
        self.depth = nnx.Param(jnp.zeros((FLOW, FLOW)))
        self.head_weight = nnx.Param(jnp.ones((FLOW, FLOW)))
        self.camera = nnx.Param(jnp.array([0.0, -0.4, 0.4, 5.0]))  # lever and focal length
        self.flow = nnx.Param(jnp.zeros((config.num_features, FLOW, FLOW, 3)))

    def to_latent(self, curves: Float[Array, "n 4 c"]) -> Float[Array, "n z"]:
        """Windows of scaled curves -> latents."""
        return (curves.reshape(len(curves), -1) - self.mean[None]) @ self.analysis[...]

    def to_curves(self, latent: Float[Array, "n z"]) -> Float[Array, "n 4 c"]:
        """Latents -> windows, as far as the code carries them."""
        flat = latent @ self.synthesis[...] + self.mean[None]
        return flat.reshape(len(latent), GROUP, -1)


class PortraitNetwork(nnx.Module):
    """Portraits -> features, corrections of the mean head, surface."""

    def __init__(self, config: AnchoredVAEConfig, *, rngs: nnx.Rngs):
        p32, p16, p8, p4 = config.feature_widths
        width, leads = config.frame_width, len(config.leading)
        self.at32 = _conv(48, p32, 3, rngs=rngs)
        self.at16 = _conv(4 * p32, p16, 3, rngs=rngs)
        self.at8 = _conv(4 * p16, p8, 3, rngs=rngs)
        self.at4 = _conv(4 * p8, p4, 3, rngs=rngs)
        self.own16 = _conv(p4 + p8 + p16, width, 3, rngs=rngs)
        self.own32 = _conv(width + p32, width, 3, rngs=rngs)
        self.own = _conv(width, 2 * leads + 2, 1, gain=0.0, rngs=rngs)
        self.surface64 = _conv(width + 12, 16, 3, rngs=rngs)
        self.surface = _conv(16, 4, 3, gain=0.0, rngs=rngs)

    def __call__(self, small: Float[Array, "b 128 128 3"]) -> tuple[dict[int, Array], Array, Array]:
        """Features; own flow and correction of the head 64 x 64; logit of the surface 128."""
        found, x = {}, fold(small, 4)
        for cells, layer in ((32, self.at32), (16, self.at16), (8, self.at8), (4, self.at4)):
            x = _active(layer(x if cells == 32 else fold(x, 2)))
            found[cells] = x
        x = jnp.concatenate([doubled(doubled(found[4])), doubled(found[8]), found[16]], -1)
        x = _active(self.own16(x))
        x = _active(self.own32(jnp.concatenate([doubled(x), found[32]], -1)))
        own = doubled(0.01 * self.own(x))
        edge = _active(self.surface64(jnp.concatenate([doubled(x), fold(small, 2)], -1)))
        surface = _LOGIT * jnp.tanh(unfold(self.surface(edge), 2) / _LOGIT)
        return found, own, surface


class FrameNetwork(nnx.Module):
    """Codes beside the portrait's features -> corrections of the flow, mask and paint."""

    def __init__(self, config: AnchoredVAEConfig, *, rngs: nnx.Rngs):
        (_, p16, p8, p4), e, d = config.feature_widths, config.code_width, config.flow_width
        width = config.frame_width
        self.enter = _linear(config.latent_size, 192, rngs=rngs)
        self.mix = _linear(192, 192, rngs=rngs)
        self.expand = _linear(192, GROUP * _CODE * _CODE * e, rngs=rngs)
        self.at4 = _conv(e + p4, 96, 3, rngs=rngs)
        self.at8 = _conv(96 + p8, 96, 3, rngs=rngs)
        self.at16 = _conv(96 + p16, d, 3, rngs=rngs)
        self.mix16 = _conv(d, d, 3, rngs=rngs)
        self.coarse = _conv(d, 2, 1, gain=0.0, rngs=rngs)
        self.at32 = _conv(d + 64 + 4, width, 3, rngs=rngs)
        self.mix32 = _conv(width, width, 3, rngs=rngs)
        self.out = _conv(width, 8 + 3 + 16 + 16 + 48, 1, gain=0.0, rngs=rngs)
        face = config.face_width
        self.face = _conv(width + 16 + 2, face, 3, rngs=rngs)
        self.face_mix = _conv(face, face, 3, rngs=rngs)
        self.face_out = _conv(face, 8 + 4 + 12, 1, gain=0.0, rngs=rngs)

    def codes(self, latent: Float[Array, "n z"]) -> Float[Array, "n 4 h w c"]:
        """Codes of the four frames of latents."""
        x = _active(self.enter(latent))
        x = _active(x + self.mix(x))
        return self.expand(x).reshape(len(x), GROUP, _CODE, _CODE, -1)

    def coarse_features(
        self, codes: Float[Array, "f h w c"], features: dict[int, Array]
    ) -> Float[Array, "f 16 16 d"]:
        """Codes of frames and the features of their portraits, up to 16 x 16 cells."""

        def beside(x, cells):  # every frame sees its portrait's features
            own = jnp.repeat(features[cells], len(x) // len(features[cells]), 0)
            return jnp.concatenate([x, own], -1)

        x = _active(self.at4(beside(codes, 4)))
        x = _active(self.at8(beside(doubled(x), 8)))
        x = _active(self.at16(beside(doubled(x), 16)))
        return _active(x + self.mix16(x))

    def parts(
        self,
        x: Float[Array, "f 16 16 d"],
        moved: Float[Array, "f 128 128 4"],
        low: Float[Array, "f 64 64 4"],
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Flow's residual 128, shade 32, mask 128, outline 128, colour 128.

        Args:
            x: of `coarse_features`.
            moved: the portrait as the coarse flow warps it, with its surface.
            low: that flow, how much it is trusted, and the expression's share of it.
        """
        x = jnp.concatenate([doubled(x), fold(moved, 4), shrunk(low, 32)], -1)
        x = _active(self.at32(x))
        x = _active(x + self.mix32(x))
        flow, shade, mask, outline, colour = jnp.split(self.out(x), (8, 11, 27, 43), -1)
        fine = jnp.concatenate([doubled(x), fold(moved, 2), low[..., 2:]], -1)
        fine = _active(self.face(fine[:, *_FACE]))
        fine = self.face_out(_active(fine + self.face_mix(fine)))
        rows, columns = _FACE
        around = ((rows.start, FLOW - rows.stop), (columns.start, FLOW - columns.stop))
        fine = unfold(jnp.pad(_faded(fine), ((0, 0), *around, (0, 0))), 2)
        return (
            doubled(unfold(flow, 2)) + fine[..., :2],
            shade,
            unfold(mask, 4) + fine[..., 2:3],
            unfold(outline, 4),
            unfold(colour, 4) + fine[..., 3:],
        )


class MotionReader(nnx.Module):
    """Portrait and frame -> curves of motion."""

    def __init__(self, config: AnchoredVAEConfig, *, rngs: nnx.Rngs):
        e16, e8, e4 = config.encoder_widths
        self.at16 = _conv(4 * 96, e16, 3, rngs=rngs)
        self.mix16 = _conv(e16, e16, 3, rngs=rngs)
        self.at8 = _conv(4 * e16, e8, 3, rngs=rngs)
        self.at4 = _conv(4 * e8, e4, 3, rngs=rngs)
        self.out = _linear(_CODE * _CODE * e4, len(config.curves), gain=0.1, rngs=rngs)

    def __call__(
        self, portrait: Float[Array, "b 128 128 3"], frames: Float[Array, "f 128 128 3"]
    ) -> Float[Array, "f c"]:
        base = jnp.repeat(fold(portrait, 4), len(frames) // len(portrait), 0)
        x = jnp.concatenate([4 * (fold(frames, 4) - base), base], -1)
        x = _active(self.at16(fold(x, 2)))
        x = _active(x + self.mix16(x))
        x = _active(self.at8(fold(x, 2)))
        x = _active(self.at4(fold(x, 2)))
        return self.out(x.reshape(len(x), -1))


class AnchoredVAE(VideoVAE):
    """Video VAE whose first frame is the portrait: `1 + 4 (n - 1)` frames <-> `n` latents."""

    def __init__(self, config: AnchoredVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.basis = MotionBasis(config)
        self.encoder = MotionReader(config, rngs=rngs)
        self.portrait = PortraitNetwork(config, rngs=rngs)
        self.frame = FrameNetwork(config, rngs=rngs)

    def encode(self, video: Video) -> Latent:
        """Reads the motion of a clip whose first frame is the portrait.

        Args:
            video: `1 + 4 (n - 1)` square frames of at least 128 pixels.

        Returns:
            `n` latents; the first is that of no motion.
        """
        b, frames, height, width = video.shape[:4]
        if frames % GROUP != 1 or height != width or height < SIDE:
            raise ValueError(
                f"A video of {frames} frames of {height}x{width} pixels: this VAE encodes "
                f"1, 5, 9, ... square frames of at least {SIDE} pixels; cut or pad the video."
            )
        small = shrunk(video.reshape(b * frames, *video.shape[2:]), SIDE)
        small = small.reshape(b, frames, SIDE, SIDE, 3)
        still = jnp.zeros((b, GROUP, len(self.config.curves)))
        later = small[:, 1:].reshape(b * (frames - 1), SIDE, SIDE, 3)
        curves = self.encoder(small[:, 0], later).reshape(b, frames - 1, -1) if frames > 1 else ()
        windows = jnp.concatenate([still, *([curves] if frames > 1 else [])], 1)
        latent = self.basis.to_latent(windows.reshape(-1, GROUP, len(self.config.curves)))
        return latent.reshape(b, -1, *self.config.latent_shape)

    def encode_still(self, portrait: Float[Array, "b 1 H W 3"], latents: int) -> Latent:
        """The latent of no motion, whatever the portrait; see `VideoVAE`."""
        return jnp.repeat(self.encode(portrait), latents, 1)

    def encode_clip(self, portrait: Float[Array, "b H W 3"], video: Video) -> Latent:
        """The motion of clips against their portraits, which stand in for the first frames."""
        return self.encode(jnp.concatenate([portrait[:, None], video[:, 1:]], 1))

    def start(
        self, portrait: Float[Array, "b 1 H W 3"], latent: Float[Array, "b 1 h w c"]
    ) -> tuple[Float[Array, "b 1 H W 3"], PreparedPortrait]:
        """Looks at portraits, for which the first latents stand; see `VideoVAE`."""
        del latent
        return portrait, self.prepare(portrait[:, 0])

    def prepare(self, portrait: Float[Array, "b H W 3"]) -> PreparedPortrait:
        """Looks at portraits once; side and framing are those of the frames to be decoded."""
        side = portrait.shape[1]
        self.config.latent_grid(side, portrait.shape[2])
        small = shrunk(portrait, SIDE)
        features, own, surface = self.portrait(small)
        correction = 10 * own[..., -2:]
        head = HeadShape(
            self.basis.depth[None, ..., None] + correction[..., :1],
            jnp.clip(self.basis.head_weight[None, ..., None] + correction[..., 1:], 0, 1),
            self.basis.camera[:3],
            self.basis.camera[3],
        )
        # The surface is learned from the truth, not through what the warp makes of it.
        told = jax.lax.stop_gradient(surface)
        # Pixels at the outline show some of the person, which must not stay behind.
        hidden = widened(told, _EDGE)
        fill = filled(small, 1 - jax.nn.sigmoid(hidden))
        share = jax.nn.sigmoid(enlarged(hidden, side))
        return PreparedPortrait(
            features=features,
            own_flow=own[..., :-2],
            head=head,
            surface=surface,
            small=packed(jnp.concatenate([small, told], -1)),
            full=packed(jnp.concatenate([sharpened(portrait), enlarged(told, side)], -1)),
            backdrop=(1 - share) * portrait + share * enlarged(fill, side),
        )

    def decode_next(
        self, state: PreparedPortrait, latent: Latent
    ) -> tuple[Float[Array, "b T H W 3"], PreparedPortrait]:
        """Latents -> four frames each; the state is the portrait and stays as it is."""
        b, n = latent.shape[:2]
        curves, codes = self.curves_and_codes(latent.reshape(b * n, -1))
        frames = b * n * GROUP
        parts = self.paint(
            state, curves.reshape(frames, -1), codes.reshape(frames, *codes.shape[2:])
        )
        return parts.picture.reshape(b, n * GROUP, *parts.picture.shape[1:]), state

    def curves_and_codes(
        self, latent: Float[Array, "n z"]
    ) -> tuple[Float[Array, "n 4 c"], Float[Array, "n 4 h w e"]]:
        """Curves of motion and codes of the four frames of each latent."""
        return self.basis.to_curves(latent), self.frame.codes(latent)

    def paint(
        self,
        ready: PreparedPortrait,
        curves: Float[Array, "f c"],
        codes: Float[Array, "f h w e"],
    ) -> Decoded:
        """Draws frames from what their latents say; those of a portrait one after the other."""
        config, b = self.config, len(ready.small)
        # Depth and weight are learned from the truth, not through four steps of the inversion.
        place = rigid_head.source(config.pose(curves), jax.lax.stop_gradient(ready.head))
        mean = jnp.einsum("fk,khwc->fhwc", config.features(curves), self.basis.flow[...])
        lead = config.lead(curves).reshape(b, -1, len(config.leading))
        own = ready.own_flow.reshape(*ready.own_flow.shape[:3], -1, 2)
        own = jnp.einsum("bhwlc,btl->bthwc", own, lead).reshape(len(mean), FLOW, FLOW, 2)
        mean = mean.at[..., :2].add(own)
        mean = jax.vmap(lambda m, at: read(packed(m[None]), at[None])[0])(mean, place)
        coarse = place + mean[..., :2] - grid(FLOW, FLOW)[None]
        trust = jnp.clip(8 * mean[..., 2:] - 5, -4, 3)

        x = self.frame.coarse_features(codes, ready.features)
        coarse = coarse + 0.1 * doubled(doubled(self.frame.coarse(x)))
        moved = read(ready.small, enlarged(coarse, SIDE) + grid(SIDE, SIDE)[None])
        moved = jnp.concatenate([moved[..., :3], moved[..., 3:] / _LOGIT], -1)
        low = jnp.concatenate([20 * coarse, trust, 20 * mean[..., :1]], -1)
        flow, shade, mask, outline, colour = self.frame.parts(x, moved, low)

        side, flow = ready.side, doubled(coarse) + 0.1 * flow
        warped = read(ready.full, enlarged(flow, side) + grid(side, side)[None])
        mask = enlarged(jax.nn.sigmoid(mask + enlarged(trust, SIDE)), side)
        outline = warped[..., 3:] + enlarged(outline, side)
        shade, colour = enlarged(0.3 * jnp.tanh(shade), side), enlarged(colour, side)
        head = mask * (warped[..., :3] + shade) + (1 - mask) * colour
        share = jax.nn.sigmoid(outline)
        behind = jnp.repeat(ready.backdrop, len(head) // b, 0)
        picture = share * head + (1 - share) * behind
        return Decoded(picture, flow, coarse, mask, colour, outline)


def _faded(x: Float[Array, "f h w c"]) -> Float[Array, "f h w c"]:
    """Falls to nothing towards the borders."""
    rows, columns = (jnp.clip((jnp.arange(n) + 0.5) / 4, 0, 1) for n in x.shape[1:3])
    rows, columns = jnp.minimum(rows, rows[::-1]), jnp.minimum(columns, columns[::-1])
    return x * (rows[None, :, None, None] * columns[None, None, :, None])


def _active(x: Array) -> Array:
    return jax.nn.leaky_relu(x, 0.1)


def _conv(inputs: int, outputs: int, size: int, *, gain: float = 1.0, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs, outputs, (size, size), padding="SAME", kernel_init=_start(gain), rngs=rngs
    )


def _linear(inputs: int, outputs: int, *, gain: float = 1.0, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=_start(gain), rngs=rngs)


def _start(gain: float) -> Any:
    if not gain:
        return jax.nn.initializers.zeros
    return jax.nn.initializers.variance_scaling(2.0 * gain**2, "fan_in", "normal")
