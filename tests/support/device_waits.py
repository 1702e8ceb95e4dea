"""A device on which nothing can be read, without a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select"),
    *("unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc"),
}


class ForbidReads(TorchDispatchMode):
    """Raises at an operation that makes the host wait for a device."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.split("::")[1].rstrip("_")
        by_mask = name in ("index", "index_put", "_index_put_impl") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        by_count = name == "repeat_interleave" and isinstance(args[0] if len(args) == 1 else args[1], torch.Tensor)
        if name in READS or by_mask or (by_count and (kwargs or {}).get("output_size") is None):
            raise AssertionError(f"{op} waits for the device")
        return op(*args, **(kwargs or {}))


class ForbidUploads(TorchDispatchMode):
    """Raises where numbers of the host are copied to `meta`, which stands for a device: no graph can hold that."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        copied = [item for item in args if isinstance(item, torch.Tensor)]
        if (
            op._schema.name in ("aten::_to_copy", "aten::copy_")
            and result.device.type == "meta"
            and any(item.device.type == "cpu" for item in copied)
        ):
            raise AssertionError(f"{op} copies numbers to the device")
        return result
