"""Two devices on a machine that has none: tensors have a pretended device, and PyTorch computes on the CPU."""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only


class PretendedDevices(TorchFunctionMode):
    """While it is active, tensors can be on devices such as "cuda:0" and "cuda:1". Their values are on the CPU.

    As in PyTorch, functions refuse tensors of several devices, and a result is on the device of the arguments. A
    tensor that no function has put on a pretended device goes with every device.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.pretended for tensor in tensors if hasattr(tensor, "pretended")}
        if func == torch.Tensor.device.__get__:
            return devices.pop() if devices else func(*args)
        args, kwargs, target = self._without_device(func, args, kwargs or {})
        if target is None and len(devices) > 1:
            raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device, but found {devices}")
        result = func(*args, **kwargs)
        target = target or (devices.pop() if devices else torch.device("cpu"))
        return result if target.type == "cpu" else tree_map_only(torch.Tensor, lambda one: put(one, target), result)

    @staticmethod
    def _without_device(func, args: tuple, kwargs: dict) -> tuple[tuple, dict, torch.device | None]:
        """Take the pretended device out of the arguments of `Tensor.to` and of functions that make tensors."""
        target = kwargs.get("device")
        if func is torch.Tensor.to:
            target = next((one for one in args[1:] if isinstance(one, torch.device | str)), target)
            args = (args[0].clone(), *(one for one in args[1:] if not isinstance(one, torch.device | str)))
            args += ("cpu",) * (len(args) == 1)
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        target = None if target is None else torch.device(target)
        return args, kwargs, target


def put(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Put a tensor on a pretended device, in place."""
    tensor.pretended = torch.device(device)
    return tensor


def place(model: torch.nn.Module, device_map: dict[str, str]) -> torch.nn.Module:
    """Put parts of a model on pretended devices, with the hooks of Accelerate's `dispatch_model`, in place."""
    for name, device in device_map.items():
        part = model.get_submodule(name)
        for tensor in (*part.parameters(), *part.buffers()):
            put(tensor, device)
        add_hook_to_module(part, AlignDevicesHook(torch.device(device)))
    return model
