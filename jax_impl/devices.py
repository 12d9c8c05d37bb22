"""Devices visible to JAX, for ``pve env``."""

import json

import jax

__all__ = ["devices"]


def devices() -> list[str]:
    """Names of all devices of the default platform.

    Example:
        >>> from jax_impl.devices import devices
        >>> ":0, " in devices()[0]
        True
    """
    return [f"{device.platform}:{device.id}, {device.device_kind}" for device in jax.devices()]


if __name__ == "__main__":
    print(json.dumps(devices()))
