"""Devices that PyTorch sees, for ``pve env``."""

import json

import torch

__all__ = ["devices"]


def devices() -> list[str]:
    """List the CPU and all accelerators, with their names if known.

    Example:
        >>> from torch_impl.devices import devices
        >>> devices()[0].startswith("cpu, ")
        True
    """
    found = [f"cpu, {torch.get_num_threads()} threads"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        for index in range(torch.accelerator.device_count()):
            name = f", {torch.cuda.get_device_name(index)}" if torch.cuda.is_available() else ""
            found.append(f"{kind}:{index}{name}")
    return found


if __name__ == "__main__":
    print(json.dumps(devices()))
