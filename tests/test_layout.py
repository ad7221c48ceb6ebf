import jax
import pytest

from jax_avatar.layout import Layout, make_mesh, parse_layout


@pytest.mark.parametrize(
    ("mesh", "steps", "layout"),
    [
        ("1", 4, Layout(1, 1, False, 4)),
        ("2", 4, Layout(2, 1, False, 2)),
        ("3", 4, Layout(2, 1, True, 2)),
        ("4", 4, Layout(4, 1, False, 1)),
        ("5", 4, Layout(4, 1, True, 1)),
        ("5", 8, Layout(4, 1, True, 2)),
        ("4+1", 4, Layout(4, 1, True, 1)),
        ("4x2+1", 4, Layout(4, 2, True, 1)),
        ("2x2", 4, Layout(2, 2, False, 2)),
        ("1+1", 4, Layout(1, 1, True, 4)),
    ],
)
def test_layouts(mesh, steps, layout):
    assert parse_layout(mesh, steps) == layout


def test_devices_are_counted():
    assert parse_layout("4x2+1", 4).num_devices == 9
    assert parse_layout("1", 4).is_sequential and not parse_layout("1+1", 4).is_sequential


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("7", r"--mesh 7: 4 timesteps.*pass --mesh 1, 2, 3, 4 or 5.*6 or 7 steps"),
        ("0", "at least one device"),
        ("3x2", r"4 timesteps do not spread evenly over 3 slices; pass 1, 2 or 4"),
        ("4+2", "VAE runs on one device"),
        ("four", "expected a number of slices"),
        ("-1", "expected a number of slices"),
        ("4x0", "at least one device"),
    ],
)
def test_impossible_layouts_say_what_to_change(mesh, message):
    with pytest.raises(ValueError, match=message):
        parse_layout(mesh, 4)


def test_too_few_devices_are_named():
    with pytest.raises(ValueError, match=r"needs 9 devices, 8 CPU found"):
        make_mesh(parse_layout("4x2+1", 4))


def test_the_vae_gets_its_own_device_or_shares_the_last():
    devices = jax.devices()
    mesh, vae = make_mesh(parse_layout("5", 4))
    assert mesh.shape == {"stage": 4, "model": 1} and vae == devices[4]
    mesh, vae = make_mesh(parse_layout("4", 4))
    assert vae == mesh.devices[-1, 0] == devices[3]
