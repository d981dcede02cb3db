"""Per-sample gradients of single layers: one small product from what the layer saw and returned.

A rule gets R rows of the layer's input ``x_R`` and of the loss gradient at its output ``d_R`` and
gives the gradient of each row's loss with respect to one parameter, shape (R, *parameter shape).
Rules never touch the module's state. Whether a rule applies to a model is not believed but tried
(see ``trials``), so subclasses of a layer may use its rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.state import uses_batch_statistics

Rule = Callable[[nn.Module, str, Tensor, Tensor, Tensor], Tensor | None]
"""(module, parameter name, x_R, d_R, out): writes (R, *parameter shape) into ``out``, or returns what is to be
written there: what several layers return is copied at once."""

Prepare = Callable[[nn.Module, Tensor], Tensor]
"""Applied to the whole batch's input before rows are taken: normalisation layers need it."""


def linear(module: nn.Module, name: str, x_R: Tensor, d_R: Tensor, out: Tensor) -> Tensor | None:
    """``y = x W^T + b``; axes between rows and features are positions, summed over."""
    if name == "bias":
        return _summed(d_R, out)
    if d_R.ndim == 2:
        torch.mul(d_R.unsqueeze(2), x_R.unsqueeze(1), out=out)
        return None
    left, right = d_R.flatten(1, -2), x_R.flatten(1, -2)
    if on_lines(left) and on_lines(right):
        return torch.bmm(left.transpose(1, 2), right)
    left, right = left.transpose(1, 2), right.transpose(1, 2)
    padded = aligned(right, *right.shape)
    padded[:, : right.shape[1], : right.shape[2]] = right
    return products(left, padded)[:, :, : right.shape[1]]


def _summed(d_R: Tensor, out: Tensor) -> Tensor | None:
    """Give the sum over the positions between rows and features."""
    if d_R.ndim == 2:
        return d_R
    torch.sum(d_R.flatten(1, -2), 1, out=out)
    return None


class AppliedLinear(nn.Linear):
    """A stand-in for a Linear layer that another layer is in part; see ``applied``.

    Args:
        weight: (O, I), or more rows than are meant.
        bias: (O,), likewise; None: there is none.
        rows: Which rows of a parameter are meant; None: all.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, rows: Mapping[str, slice | None] | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.rows = dict(rows or {})


def applied_linear(module: nn.Module, name: str, x_R: Tensor, d_R: Tensor, out: Tensor) -> Tensor | None:
    """As ``linear``, in the rows of the parameter that are meant."""
    assert isinstance(module, AppliedLinear)
    rows = module.rows.get(name)
    if rows is None:
        return linear(module, name, x_R, d_R, out)
    out.zero_()
    found = linear(module, name, x_R, d_R, out[:, rows])
    if found is not None:
        out[:, rows] = found
    return None


def transposed_linear(module: nn.Module, name: str, x_R: Tensor, d_R: Tensor, out: Tensor) -> Tensor | None:
    """``y = x W + b`` with W (I, O): the ``Conv1D`` of transformers."""
    if name == "bias":
        return _summed(d_R, out)
    if d_R.ndim == 2:
        x_R, d_R = x_R.unsqueeze(1), d_R.unsqueeze(1)
    return linear(module, name, d_R, x_R, out)


def convolution(module: nn.Module, name: str, x_R: Tensor, d_R: Tensor, out: Tensor) -> Tensor | None:
    """Conv1d/2d/3d with any stride, padding, dilation and groups: windows times output gradients."""
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    d = d_R.flatten(2)
    if name == "bias":
        torch.sum(d, 2, out=out)
        return None
    if (x_R.device.type, x_R.dtype) in GROUPED:
        return _grouped(module, x_R, d_R)
    left = d.reshape(x_R.shape[0] * module.groups, module.out_channels // module.groups, -1)
    product = products(left, _windows(module, x_R, d_R.shape[2:]))
    product = product[:, :, : module.weight[0].numel()].unflatten(0, (-1, module.groups))
    gradients: Tensor = product.reshape(-1, *module.weight.shape)
    return gradients


GROUPED = frozenset({("cpu", torch.float32)})
"""Where rows are groups of one convolution, which neither copies windows nor leaves the cache (oneDNN's kernels)."""


def _grouped(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x_R: Tensor, d_R: Tensor) -> Tensor:
    """Return the weight's gradients as those of one convolution with a group a row (and group)."""
    rows, padding = len(x_R), module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":  # may differ from side to side
        x_R, padding = _padded(module, x_R), (0,) * (x_R.ndim - 2)
    _none, found, _no_bias = torch.ops.aten.convolution_backward(
        d_R.reshape(1, -1, *d_R.shape[2:]),
        x_R.reshape(1, -1, *x_R.shape[2:]),
        x_R.new_empty(rows * module.out_channels, *module.weight.shape[1:]),  # only its shape is read
        None,
        module.stride,
        padding,
        module.dilation,
        False,
        (0,) * len(padding),
        rows * module.groups,
        (False, True, False),
    )
    gradients: Tensor = found.reshape(rows, *module.weight.shape)
    return gradients


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x_R: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # The reversed list is what F.pad wants; it also holds what padding="same" came to.
    pads = module._reversed_padding_repeated_twice
    return F.pad(x_R, pads, mode=mode) if any(pads) else x_R


def _windows(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x_R: Tensor, out_size: torch.Size) -> Tensor:
    """Return what each kernel position saw, (R * groups, I, X), I = channels a group times kernel."""
    windows = _view_of_windows(module, x_R, out_size)
    kernel = (module.in_channels // module.groups, *module.kernel_size)
    length, positions = math.prod(kernel), math.prod(out_size)
    out = aligned(x_R, x_R.shape[0] * module.groups, length, positions)
    inner = out.view(x_R.shape[0], module.groups, *out.shape[1:])[:, :, :length, :positions]
    inner = inner.unflatten(3, out_size).unflatten(2, kernel)
    inner.copy_(windows.unflatten(1, (module.groups, kernel[0])))
    return out


def _view_of_windows(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x_R: Tensor, out_size: torch.Size) -> Tensor:
    """Return the same (R, channels, *kernel, *out_size), nothing copied."""
    space = x_R.ndim - 2
    x_R = _padded(module, x_R).contiguous()
    strides = x_R.stride()
    size = (*x_R.shape[:2], *module.kernel_size, *out_size)
    stride = (
        *strides[:2],
        *(strides[2 + k] * module.dilation[k] for k in range(space)),
        *(strides[2 + k] * module.stride[k] for k in range(space)),
    )
    return x_R.as_strided(size, stride)


def unfolded(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x_B: Tensor, out_size: torch.Size, steps: Sequence[int]
) -> Tensor:
    """Return what an ungrouped convolution saw at every so many positions of its output, (B * X, I)."""
    windows = _view_of_windows(module, x_B, out_size)
    kernel = windows.ndim - len(out_size)
    windows = windows[(slice(None),) * kernel + tuple(slice(None, None, step) for step in steps)]
    axes = (0, *range(kernel, windows.ndim), *range(1, kernel))
    return windows.permute(axes).reshape(-1, module.weight[0].numel())


ALIGNMENT = 16
"""Numbers to a cache line of float32. Matrix products of a batch give each row of it the same bits
only when every row's matrices begin at the same offset from a line, so they are padded to it."""


def on_lines(values: Tensor) -> bool:
    """Whether each row's matrix (the axes after the first) begins at a line as it lies."""
    return values.is_contiguous() and values[0].numel() % ALIGNMENT == 0


def begins_a_line(values: Tensor) -> bool:
    """Whether a batch lies as a fresh copy of some of its rows would."""
    return values.is_contiguous() and values.data_ptr() % 64 == 0


def aligned(like: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """Return a (batch, rows, columns) tensor with both last axes padded up; padding is zero, the rest not set."""
    height, width = (-(-count // ALIGNMENT) * ALIGNMENT for count in (rows, columns))
    out = like.new_empty(batch, height, width)
    if height > rows:
        out[:, rows:].zero_()
    if width > columns:
        out[:, :, columns:].zero_()
    return out


def products(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right^T`` per batch entry, (batch, O, padded I).

    Args:
        left: (batch, O, X), any layout.
        right: (batch, padded I, padded X), from ``aligned``.
    """
    if left.shape[2] != right.shape[2] or not left.is_contiguous():
        padded = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
        padded[:, :, left.shape[2] :].zero_()
        padded[:, :, : left.shape[2]] = left
        left = padded
    return torch.bmm(left, right.transpose(1, 2))


def embedding(module: nn.Module, name: str, x_R: Tensor, d_R: Tensor, out: Tensor) -> Tensor:
    """Rows of the table collect the output gradients of the positions that used them."""
    assert isinstance(module, nn.Embedding)
    rows, (vocabulary, width) = x_R.shape[0], module.weight.shape
    index = x_R.reshape(rows, -1)
    d = d_R.reshape(rows, -1, width)
    if module.padding_idx is not None:
        d = d * (index != module.padding_idx).unsqueeze(2)
    table = d.new_zeros(rows * vocabulary, width)
    offset = torch.arange(rows, device=index.device).unsqueeze(1) * vocabulary
    table.index_add_(0, (index + offset).reshape(-1), d.reshape(-1, width))
    return table.view(rows, vocabulary, width)


def embedding_bag(module: nn.Module, name: str, x_R: Tensor, d_R: Tensor, out: Tensor) -> Tensor:
    """``y = sum or mean`` of the rows of a bag: each position gets the output's gradient, or its share."""
    assert isinstance(module, nn.EmbeddingBag)
    assert x_R.ndim == 2
    assert module.mode != "max"
    d = d_R.unsqueeze(1).expand(-1, x_R.shape[1], -1)
    kept = torch.ones_like(x_R) if module.padding_idx is None else x_R != module.padding_idx
    weight = kept.to(d)
    if module.mode == "mean":
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
    rows, (vocabulary, width) = x_R.shape[0], module.weight.shape
    table = d.new_zeros(rows * vocabulary, width)
    offset = torch.arange(rows, device=x_R.device).unsqueeze(1) * vocabulary
    table.index_add_(0, (x_R + offset).reshape(-1), (d * weight.unsqueeze(2)).reshape(-1, width))
    return table.view(rows, vocabulary, width)


def scale(module: nn.Module, name: str, x_R: Tensor, d_R: Tensor, out: Tensor) -> Tensor | None:
    """``y = xhat * weight + ...`` along the last axis; ``x_R`` is xhat here."""
    product = d_R * x_R
    assert product.shape[-1:] == out.shape[1:]
    return _summed(product, out)


def layer_norm(module: nn.Module, name: str, x_R: Tensor, d_R: Tensor, out: Tensor) -> Tensor | None:
    """``y = xhat * weight + bias`` over the trailing axes; ``x_R`` is xhat here."""
    assert isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    product = d_R if name == "bias" else d_R * x_R
    between = product.ndim - 1 - len(module.normalized_shape)
    if not between:
        return product
    torch.sum(product, dim=tuple(range(1, 1 + between)), out=out)
    return None


def channel_norm(module: nn.Module, name: str, x_R: Tensor, d_R: Tensor, out: Tensor) -> Tensor | None:
    """``y = xhat * weight + bias`` per channel (axis 1); ``x_R`` is xhat here."""
    product = d_R if name == "bias" else d_R * x_R
    if product.ndim == 2:
        return product
    torch.sum(product.flatten(2), 2, out=out)
    return None


def together(module: nn.Module, name: str, x_R: Tensor, d_R: Tensor, out: Tensor) -> Tensor | None:
    """BatchNorm: all layers of this kind are worked on together, see ``channels``."""
    raise AssertionError(type(module).__name__)


def _layer_xhat(module: nn.Module, x_B: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    return F.layer_norm(x_B, module.normalized_shape, None, None, module.eps)


def _rms_xhat(module: nn.Module, x_B: Tensor) -> Tensor:
    assert isinstance(module, nn.RMSNorm)
    return F.rms_norm(x_B, module.normalized_shape, None, module.eps)


def _group_xhat(module: nn.Module, x_B: Tensor) -> Tensor:
    assert isinstance(module, nn.GroupNorm)
    return F.group_norm(x_B, module.num_groups, None, None, module.eps)


def _slope(module: nn.Module, x_B: Tensor) -> Tensor:
    """Return d output / d weight of a layer that is affine in its only parameter, element by element.

    Raises:
        RuntimeError: It is not called with ``x_B`` alone.
    """
    ((name, parameter),) = module.named_parameters(recurse=False)
    kept, ends = dict(vars(module)), []
    with torch.no_grad():
        try:
            for value in (1.0, 0.0):
                module._parameters[name] = nn.Parameter(torch.full_like(parameter, value), False)
                ends.append(module.forward(x_B))
        except Exception as error:
            raise RuntimeError(
                f"{type(module).__name__} is no function of its input alone: {error}"
            ) from error
        finally:
            module._parameters[name] = parameter
            vars(module).update(kept)  # what it may count
    difference: Tensor = ends[0] - ends[1]
    return difference


def batch_statistics(module: nn.Module, x_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance that a BatchNorm layer normalises ``x_B`` with, shape (C,)."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    if uses_batch_statistics(module):
        axes = [axis for axis in range(x_B.ndim) if axis != 1]
        variance, mean = torch.var_mean(x_B, dim=axes, correction=0)
        return mean, variance
    assert module.running_mean is not None
    assert module.running_var is not None
    return module.running_mean, module.running_var


RULES: tuple[tuple[type[nn.Module], Rule, Prepare | None], ...] = (
    (AppliedLinear, applied_linear, None),
    (nn.Linear, linear, None),
    (nn.Conv1d, convolution, None),
    (nn.Conv2d, convolution, None),
    (nn.Conv3d, convolution, None),
    (nn.Embedding, embedding, None),
    (nn.EmbeddingBag, embedding_bag, None),
    (nn.LayerNorm, layer_norm, _layer_xhat),
    (nn.RMSNorm, layer_norm, _rms_xhat),
    (nn.GroupNorm, channel_norm, _group_xhat),
    (nn.modules.batchnorm._BatchNorm, together, None),
)


def rule_for(module: nn.Module) -> tuple[Rule, Prepare | None] | None:
    """Return the rule (and its preparation) of a layer, or None when there is none."""
    for kind, rule, prepare in RULES:
        if isinstance(module, kind):
            return rule, prepare
    if is_transposed_linear(module):
        return transposed_linear, None
    if _scales(module):
        return scale, _slope
    return None


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a layer looks like the ``Conv1D`` of transformers: y = x W + b with W (I, O)."""
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if type(module).__name__ != "Conv1D" or weight is None or weight.ndim != 2:
        return False
    return bias is None or bias.shape == weight.shape[1:]


def _scales(module: nn.Module) -> bool:
    """Whether a layer looks as if it did no more than scale features: RMSNorm by any name, LayerScale."""
    own = list(module.parameters(recurse=False))
    inner = next(module.children(), None) is not None or next(module.buffers(recurse=False), None) is not None
    return len(own) == 1 and own[0].ndim == 1 and not inner
