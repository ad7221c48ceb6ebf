"""Joins the hosts of a run, before anything touches a device."""

import os

__all__ = ["join_hosts"]

_ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "hosts": "JAX_NUM_PROCESSES",
    "host": "JAX_PROCESS_ID",
}


def join_hosts(multihost: bool, coordinator: str | None, hosts: int | None, host: int | None):
    """Starts `jax.distributed` if the flags say so.

    Args:
        multihost: whether to; where only this is given, TPU pods and job schedulers tell the rest.
        coordinator: HOST:PORT of the first host.
        hosts: how many there are.
        host: number of this one, from 0.

    Raises:
        ValueError: some of the three are missing, or the hosts did not find each other.
    """
    given = {"coordinator": coordinator, "hosts": hosts, "host": host}
    for name, variable in _ENVIRONMENT.items():
        if given[name] is None and variable in os.environ:
            text = os.environ[variable]
            given[name] = text if name == "coordinator" else int(text)
    if not multihost and all(value is None for value in (coordinator, hosts, host)):
        return
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        hints = ", ".join(f"--{name} (or {_ENVIRONMENT[name]})" for name in missing)
        raise ValueError(f"several hosts need --coordinator, --hosts and --host; missing: {hints}.")
    if not missing and not 0 <= given["host"] < given["hosts"]:
        raise ValueError(
            f"--host {given['host']} of --hosts {given['hosts']}: hosts are numbered from 0."
        )
    import jax

    try:
        jax.distributed.initialize(given["coordinator"], given["hosts"], given["host"])
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the hosts of this run did not find each other ({error}); outside of a TPU pod or a "
            "job scheduler pass --coordinator HOST:PORT --hosts N --host I on every host."
        ) from error
