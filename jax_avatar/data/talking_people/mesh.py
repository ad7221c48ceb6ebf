"""The head-and-shoulders mesh all talking people share, with its shape targets and face units.

The arrays come from `face_pack.npz`, a subset of the MakeHuman base mesh and its targets (CC0),
lengths in decimetres, y up, z towards the camera, the face looking along +z.
"""

import dataclasses
import functools
import pathlib

import numpy as np
from jaxtyping import Bool, Float, Int

from jax_avatar.data.talking_people import raster

FACE_PACK = pathlib.Path(__file__).with_name("face_pack.npz")

GROUPS = (
    "body",
    "left_eye",
    "right_eye",
    "upper_teeth",
    "lower_teeth",
    "tongue",
    "hair",
    "left_lashes_lower",
    "right_lashes_lower",
    "left_lashes_upper",
    "right_lashes_upper",
)
"""Names of the mesh parts; `FaceMesh.triangle_group` indexes them."""

# Heights and depths of the base mesh by which the painted features are placed.
EYE_X, EYE_Y = 0.308, 7.284
MOUTH_Y = 6.603
CHIN_Y = 6.16
TOP_Y = 8.49
NECK_Y, NECK_Z = 5.9, 0.3
PIVOT = (0.0, NECK_Y + 0.25, NECK_Z)
"""Point of the base mesh about which the head turns."""

# Factor on the width, then decimetres down and back.
_MOUTH_FIT = {
    "upper_teeth": (0.80, 0.0, 0.12),
    "lower_teeth": (0.76, 0.06, 0.12),
    "tongue": (0.90, 0.05, 0.12),
}


@dataclasses.dataclass(frozen=True, eq=False)
class FaceMesh:
    """The shared mesh; `v` vertices, `f` triangles, `x` texture coordinates, `q` face units."""

    vertices: np.ndarray  # [v 3] float32
    triangles: np.ndarray  # [f 3] int32, indices of vertices
    triangle_group: np.ndarray  # [f] int, index into GROUPS
    vertex_group: np.ndarray  # [v] int, index into GROUPS
    uv: np.ndarray  # [x 2] float32 in [0, 1], v up
    uv_triangles: np.ndarray  # [f 3] int32, indices of uv
    unit_names: tuple[str, ...]  # q names
    units: np.ndarray  # [q v 3] float32, displacement at weight 1
    shapes: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (vertex indices, displacements)
    masks: dict[str, np.ndarray]  # name -> [256 256] float32 in [0, 1], over uv
    ear_weight: np.ndarray  # [v] float32, 1 on the ears
    lips: np.ndarray  # vertex indices of both lips
    upper_lip_edge: np.ndarray  # vertex indices, midline, inner edge of the upper lip
    lower_lip_edge: np.ndarray  # the same of the lower lip
    chin: int  # vertex index
    crown: int  # vertex index

    @functools.cached_property
    def neck(self) -> Int[np.ndarray, " n"]:
        """Vertex indices of a ring about the neck, at the height that the head turns at."""
        x, y, z = self.vertices.T
        ring = (np.abs(y - PIVOT[1]) < 0.12) & (np.hypot(x, z - PIVOT[2]) < 0.75)
        return np.nonzero(ring & (self.vertex_group == GROUPS.index("body")))[0]

    def shape(self, name: str) -> Float[np.ndarray, "v 3"]:
        """Dense displacement of one shape target at weight 1."""
        indices, offsets = self.shapes[name]
        dense = np.zeros_like(self.vertices)
        dense[indices] = offsets
        return dense

    def shape_names(self, prefix: str) -> list[str]:
        """Sorted names of the shape targets that start with `prefix`."""
        return sorted(name for name in self.shapes if name.startswith(prefix))


def _sample_mask_at_vertices(
    mask: Float[np.ndarray, "r r"],
    uv: Float[np.ndarray, "x 2"],
    triangles: Int[np.ndarray, "f 3"],
    uv_triangles: Int[np.ndarray, "f 3"],
    num_vertices: int,
) -> Float[np.ndarray, " v"]:
    last = mask.shape[0] - 1
    corner = uv[uv_triangles.reshape(-1)]
    row = ((1 - corner[:, 1]) * last).astype(int).clip(0, last)
    column = (corner[:, 0] * last).astype(int).clip(0, last)
    weight = np.zeros(num_vertices, np.float32)
    np.maximum.at(weight, triangles.reshape(-1), mask[row, column])
    return weight


@functools.cache
def load_face_mesh() -> FaceMesh:
    """Reads the vendored face pack; the result is shared, do not write into its arrays."""
    with np.load(FACE_PACK, allow_pickle=False) as archive:
        pack = {name: archive[name] for name in archive.files}
    vertices = pack["verts"].astype(np.float32)
    triangles = pack["faces"].astype(np.int32)
    uv_triangles = pack["uvf"].astype(np.int32)
    triangle_group = pack["group"].astype(int)
    vertex_group = np.zeros(len(vertices), int)
    vertex_group[triangles.reshape(-1)] = np.repeat(triangle_group, 3)

    def sparse(prefix: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        names = [key[:-2] for key in pack if key.startswith(prefix) and key.endswith("/i")]
        return {
            name: (pack[f"{name}/i"].astype(int), pack[f"{name}/d"].astype(np.float32))
            for name in names
        }

    unit_targets = sparse("unit/")
    unit_names = tuple(sorted(name.removeprefix("unit/") for name in unit_targets))
    units = np.zeros((len(unit_names), *vertices.shape), np.float32)
    for row, name in zip(units, unit_names, strict=True):
        indices, offsets = unit_targets[f"unit/{name}"]
        row[indices] = offsets

    # Behind closed lips they stay high; the jaw's unit brings them into view.
    jaw_open = units[unit_names.index("jawOpen")]
    jaw_open[vertex_group == GROUPS.index("upper_teeth"), 1] -= 0.12

    masks = {key[5:]: pack[key].astype(np.float32) / 255 for key in pack if key.startswith("mask/")}

    def at_vertices(mask: str) -> np.ndarray:
        return _sample_mask_at_vertices(
            masks[mask], pack["uv"], triangles, uv_triangles, len(vertices)
        )

    # The teeth of the base mesh stand level with the inner lips and would poke through them.
    for part, (narrower, lower, deeper) in _MOUTH_FIT.items():
        inside = vertex_group == GROUPS.index(part)
        vertices[inside] = vertices[inside] * (narrower, 1, 1) - (0, lower, deeper)

    jaw_drop = jaw_open[:, 1]
    on_body = vertex_group == GROUPS.index("body")
    x, y, z = vertices.T
    lips = on_body & (at_vertices("lips") > 0.5)
    midline = lips & (np.abs(x) < 0.01)
    near_line = np.abs(y - MOUTH_Y) < 0.026
    face_front = on_body & (np.abs(x) < 0.01)
    return FaceMesh(
        vertices=vertices,
        triangles=triangles,
        triangle_group=triangle_group,
        vertex_group=vertex_group,
        uv=pack["uv"].astype(np.float32),
        uv_triangles=uv_triangles,
        unit_names=unit_names,
        units=units,
        shapes=sparse("macro/") | sparse("id/"),
        masks=masks,
        ear_weight=at_vertices("ears"),
        lips=np.nonzero(lips)[0],
        upper_lip_edge=np.nonzero(midline & near_line & (jaw_drop > -0.1))[0],
        lower_lip_edge=np.nonzero(midline & near_line & (jaw_drop < -0.1))[0],
        chin=int(np.argmin(np.where(face_front & (z > 1.3), np.abs(y - CHIN_Y - 0.01), np.inf))),
        crown=int(np.argmax(np.where(face_front, y, -np.inf))),
    )


@functools.cache
def texel_positions(
    texture_size: int,
) -> tuple[Float[np.ndarray, "2 r r 3"], Int[np.ndarray, "2 r r"]]:
    """Position on the base mesh of every texel, to place paint in space.

    Args:
        texture_size: edge of the square texture in texels.

    Returns:
        Positions and the index into `GROUPS` (-1 where no triangle maps), both for two layers:
        0 is everything but the hair part, 1 the hair part, because their charts overlap.
    """
    mesh = load_face_mesh()
    size = texture_size
    position = np.zeros((2, size, size, 3), np.float32)
    group = np.full((2, size, size), -1)
    is_hair = mesh.triangle_group == GROUPS.index("hair")
    scaled = np.stack([mesh.uv[:, 0] * size, (1 - mesh.uv[:, 1]) * size], 1).astype(np.float32)
    for layer, chosen in enumerate((~is_hair, is_hair)):
        corners = scaled[mesh.uv_triangles[chosen]].reshape(-1, 2)
        corner_position = mesh.vertices[mesh.triangles[chosen]].reshape(-1, 3)
        soup = np.arange(len(corners), dtype=np.int32).reshape(-1, 3)
        a, b, c = (corners[soup[:, i]] for i in range(3))
        clockwise = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0] > 0
        soup[clockwise] = soup[clockwise][:, [0, 2, 1]]
        ones = np.ones(len(corners), np.float32)
        one_sided = np.zeros(len(soup), np.int32)
        triangle, first, second = raster.rasterise(corners, ones, ones, one_sided, soup, size, size)
        hit = triangle >= 0
        corner = soup[triangle[hit]]
        k0, k1 = first[hit][:, None], second[hit][:, None]
        position[layer][hit] = (
            k0 * corner_position[corner[:, 0]]
            + k1 * corner_position[corner[:, 1]]
            + (1 - k0 - k1) * corner_position[corner[:, 2]]
        )
        group[layer][hit] = mesh.triangle_group[chosen][triangle[hit]]
        _grow(position[layer], group[layer])
    return position, group


def _grow(
    position: Float[np.ndarray, "r r 3"], group: Int[np.ndarray, "r r"], texels: int = 4
) -> None:
    """Widens the charts in place, so that bilinear sampling never sees an empty texel."""
    for _ in range(texels):
        for shift in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            near_group = np.roll(group, shift, (0, 1))
            near_position = np.roll(position, shift, (0, 1))
            fill: Bool[np.ndarray, "r r"] = (group < 0) & (near_group >= 0)
            group[fill] = near_group[fill]
            position[fill] = near_position[fill]
