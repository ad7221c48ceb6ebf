"""The software rasteriser: triangles to pixels and pixels to colours, on one CPU core.

`numba` compiles it on first use; without numba everything else in the package still works.
"""

import functools
import inspect
import math
import types

import numpy as np
from jaxtyping import Float, Int, UInt8


@functools.cache
def _kernels() -> types.SimpleNamespace:
    try:
        import numba
    except ImportError as error:
        raise ValueError(
            "rendering talking people needs numba, which is not installed; install the extra "
            '`people`: pip install "jax_avatar[people]"'
        ) from error
    compile_ = numba.njit(cache=True, fastmath=True)
    # The test run wraps every function in a type check, which numba cannot compile.
    rasterise, normals, shade = (
        compile_(inspect.unwrap(kernel)) for kernel in (_rasterise, _normals, _shade)
    )
    return types.SimpleNamespace(rasterise=rasterise, normals=normals, shade=shade)


def _rasterise(xy, inverse_z, visible, two_sided, triangles, depth, triangle, first, second):
    height, width = depth.shape
    for i in range(height):
        for j in range(width):
            depth[i, j] = 0.0
            triangle[i, j] = -1
    for t in range(triangles.shape[0]):
        i0, i1, i2 = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        if visible[i0] < 0 and visible[i1] < 0 and visible[i2] < 0:
            continue
        x0, y0 = xy[i0, 0], xy[i0, 1]
        x1, y1 = xy[i1, 0], xy[i1, 1]
        x2, y2 = xy[i2, 0], xy[i2, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-9:
            continue
        if area > 0 and two_sided[t] == 0:  # seen from behind; the screen's y points down
            continue
        left = max(0, math.ceil(min(x0, x1, x2) - 0.5))
        right = min(width - 1, math.floor(max(x0, x1, x2) - 0.5))
        top = max(0, math.ceil(min(y0, y1, y2) - 0.5))
        bottom = min(height - 1, math.floor(max(y0, y1, y2) - 0.5))
        for y in range(top, bottom + 1):
            py = y + 0.5
            for x in range(left, right + 1):
                px = x + 0.5
                k0 = ((x1 - px) * (y2 - py) - (x2 - px) * (y1 - py)) / area
                k1 = ((x2 - px) * (y0 - py) - (x0 - px) * (y2 - py)) / area
                k2 = 1.0 - k0 - k1
                if k0 >= -1e-6 and k1 >= -1e-6 and k2 >= -1e-6:
                    near = k0 * inverse_z[i0] + k1 * inverse_z[i1] + k2 * inverse_z[i2]
                    if near > depth[y, x]:
                        k0 = k0 * inverse_z[i0] / near
                        k1 = k1 * inverse_z[i1] / near
                        seen = k0 * visible[i0] + k1 * visible[i1] + (1 - k0 - k1) * visible[i2]
                        if seen < 0:
                            continue
                        depth[y, x] = near
                        triangle[y, x] = t
                        first[y, x] = k0
                        second[y, x] = k1


def _normals(vertices, triangles, normals):
    normals[:] = 0
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ux = vertices[b, 0] - vertices[a, 0]
        uy = vertices[b, 1] - vertices[a, 1]
        uz = vertices[b, 2] - vertices[a, 2]
        vx = vertices[c, 0] - vertices[a, 0]
        vy = vertices[c, 1] - vertices[a, 1]
        vz = vertices[c, 2] - vertices[a, 2]
        nx = uy * vz - uz * vy
        ny = uz * vx - ux * vz
        nz = ux * vy - uy * vx
        for k in range(3):
            i = triangles[t, k]
            normals[i, 0] += nx
            normals[i, 1] += ny
            normals[i, 2] += nz
    for i in range(normals.shape[0]):
        length = math.sqrt(normals[i, 0] ** 2 + normals[i, 1] ** 2 + normals[i, 2] ** 2) + 1e-12
        normals[i, 0] /= length
        normals[i, 1] /= length
        normals[i, 2] /= length


def _shade(
    triangles,
    uv_triangles,
    uv,
    normals,
    layers,
    texture,
    background,
    triangle,
    first,
    second,
    lights,
    light_colours,
    ambient,
    out,
):
    height, width = out.shape[0], out.shape[1]
    samples = triangle.shape[0] // height
    rows, columns = texture.shape[1], texture.shape[2]
    for y in range(height):
        for x in range(width):
            red = 0.0
            green = 0.0
            blue = 0.0
            for sub in range(samples * samples):
                yy = y * samples + sub // samples
                xx = x * samples + sub % samples
                t = triangle[yy, xx]
                if t < 0:
                    red += background[y, x, 0]
                    green += background[y, x, 1]
                    blue += background[y, x, 2]
                    continue
                k0 = first[yy, xx]
                k1 = second[yy, xx]
                k2 = 1 - k0 - k1
                i0, i1, i2 = triangles[t, 0], triangles[t, 1], triangles[t, 2]
                nx = k0 * normals[i0, 0] + k1 * normals[i1, 0] + k2 * normals[i2, 0]
                ny = k0 * normals[i0, 1] + k1 * normals[i1, 1] + k2 * normals[i2, 1]
                nz = k0 * normals[i0, 2] + k1 * normals[i1, 2] + k2 * normals[i2, 2]
                length = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
                nx /= length
                ny /= length
                nz /= length
                c0, c1, c2 = uv_triangles[t, 0], uv_triangles[t, 1], uv_triangles[t, 2]
                u = k0 * uv[c0, 0] + k1 * uv[c1, 0] + k2 * uv[c2, 0]
                v = k0 * uv[c0, 1] + k1 * uv[c1, 1] + k2 * uv[c2, 1]
                tx = u * columns - 0.5
                ty = (1 - v) * rows - 0.5
                x0 = min(max(math.floor(tx), 0), columns - 2)
                y0 = min(max(math.floor(ty), 0), rows - 2)
                fx = min(max(tx - x0, 0.0), 1.0)
                fy = min(max(ty - y0, 0.0), 1.0)
                p = layers[t]
                w00 = (1 - fx) * (1 - fy)
                w10 = fx * (1 - fy)
                w01 = (1 - fx) * fy
                w11 = fx * fy
                a = texture[p, y0, x0]
                b = texture[p, y0, x0 + 1]
                c = texture[p, y0 + 1, x0]
                d = texture[p, y0 + 1, x0 + 1]
                gloss = a[3] * w00 + b[3] * w10 + c[3] * w01 + d[3] * w11
                sky = 0.75 + 0.25 * ny
                lit_red = ambient[0] * sky
                lit_green = ambient[1] * sky
                lit_blue = ambient[2] * sky
                shine = 0.0
                for q in range(lights.shape[0]):
                    facing = nx * lights[q, 0] + ny * lights[q, 1] + nz * lights[q, 2]
                    # Light bleeds round the edge, red further than the rest, as in skin.
                    wrap_red = max(facing + 0.25, 0.0) / 1.25
                    wrap = max(facing + 0.12, 0.0) / 1.12
                    lit_red += light_colours[q, 0] * wrap_red
                    lit_green += light_colours[q, 1] * wrap
                    lit_blue += light_colours[q, 2] * wrap
                    hz = lights[q, 2] + 1.0
                    half = math.sqrt(lights[q, 0] ** 2 + lights[q, 1] ** 2 + hz * hz)
                    s = (nx * lights[q, 0] + ny * lights[q, 1] + nz * hz) / half
                    if s > 0 and gloss > 0:
                        shine += gloss * s ** (18.0 if gloss < 0.5 else 90.0) * light_colours[q, 0]
                red += (a[0] * w00 + b[0] * w10 + c[0] * w01 + d[0] * w11) * lit_red + shine
                green += (a[1] * w00 + b[1] * w10 + c[1] * w01 + d[1] * w11) * lit_green + shine
                blue += (a[2] * w00 + b[2] * w10 + c[2] * w01 + d[2] * w11) * lit_blue + shine
            scale = 1.0 / (samples * samples)
            out[y, x, 0] = int(255 * min(max(red * scale, 0.0), 1.0) ** (1 / 2.2) + 0.5)
            out[y, x, 1] = int(255 * min(max(green * scale, 0.0), 1.0) ** (1 / 2.2) + 0.5)
            out[y, x, 2] = int(255 * min(max(blue * scale, 0.0), 1.0) ** (1 / 2.2) + 0.5)


def rasterise(
    xy: Float[np.ndarray, "v 2"],
    inverse_z: Float[np.ndarray, " v"],
    visible: Float[np.ndarray, " v"],
    two_sided: Int[np.ndarray, " f"],
    triangles: Int[np.ndarray, "f 3"],
    height: int,
    width: int,
) -> tuple[Int[np.ndarray, "h w"], Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """Finds the nearest triangle under the centre of every pixel.

    Args:
        xy: screen position of the vertices in pixels, y down.
        inverse_z: one over the distance from the camera.
        visible: surface is cut away where the interpolated value is negative.
        two_sided: 1 for triangles that also show from behind.
        triangles: vertex indices, anticlockwise when seen from the front.
        height: rows of the picture.
        width: columns of the picture.

    Returns:
        Index of the triangle (-1 where there is none) and the weights of its first two corners,
        corrected for perspective.
    """
    depth = np.zeros((height, width), np.float32)
    triangle = np.zeros((height, width), np.int32)
    first, second = np.zeros((2, height, width), np.float32)
    _kernels().rasterise(
        xy, inverse_z, visible, two_sided, triangles, depth, triangle, first, second
    )
    return triangle, first, second


def vertex_normals(
    vertices: Float[np.ndarray, "v 3"], triangles: Int[np.ndarray, "f 3"]
) -> Float[np.ndarray, "v 3"]:
    """Unit normals, averaged over the triangles of each vertex by their area."""
    normals = np.zeros_like(vertices)
    _kernels().normals(vertices, triangles, normals)
    return normals


def shade(
    hits: tuple[Int[np.ndarray, "H W"], Float[np.ndarray, "H W"], Float[np.ndarray, "H W"]],
    triangles: Int[np.ndarray, "f 3"],
    uv_triangles: Int[np.ndarray, "f 3"],
    uv: Float[np.ndarray, "x 2"],
    normals: Float[np.ndarray, "v 3"],
    layers: Int[np.ndarray, " f"],
    texture: Float[np.ndarray, "l r r 4"],
    background: Float[np.ndarray, "h w 3"],
    lights: Float[np.ndarray, "q 3"],
    light_colours: Float[np.ndarray, "q 3"],
    ambient: Float[np.ndarray, " 3"],
) -> UInt8[np.ndarray, "h w 3"]:
    """Lights the surface under every sample and averages samples to pixels.

    Args:
        hits: result of `rasterise` at a whole multiple of the size of `background`.
        triangles: vertex indices.
        uv_triangles: texture-coordinate indices of the same triangles.
        uv: texture coordinates in [0, 1], v up.
        normals: unit normals of the vertices.
        layers: texture layer of each triangle.
        texture: linear red, green, blue and gloss in [0, 1].
        background: linear colour behind the surface; sets the size of the picture.
        lights: unit directions towards the lights.
        light_colours: linear colours of the lights.
        ambient: linear colour of the light from everywhere.

    Returns:
        The picture, gamma 2.2.
    """
    out = np.zeros(background.shape, np.uint8)
    _kernels().shade(
        triangles,
        uv_triangles,
        uv,
        normals,
        layers,
        texture,
        background,
        *hits,
        lights,
        light_colours,
        ambient,
        out,
    )
    return out
