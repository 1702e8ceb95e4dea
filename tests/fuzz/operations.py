"""The operations that random programs are made of, as Python source.

In a template `{a}` and `{b}` are real tensors, `{z}` is a complex one, `{i}` a number in [-3, 3], `{p}` one in [1, 3],
`{s}` a real number and `{k}` the seed of a constant. An operation that does not fit the tensors it meets is drawn
anew, so that a template states no shapes.
"""

# Source, a template in each line, by family. In `writes`, `{o}` is the new tensor.
_SOURCE = {
    "elementwise": """
{a}.relu()
F.relu6({a} * 3)
F.hardtanh({a})
F.hardtanh({a}, 0, {p})
F.leaky_relu({a}, 0.2)
F.prelu({a}, const({k}, 1))
F.prelu({a}, const({k}, {a}.shape[1]))
F.elu({a}, 0.7)
F.celu({a}, 0.75)
F.selu({a})
F.gelu({a})
F.gelu({a}, approximate='tanh')
F.silu({a})
F.mish({a})
F.hardswish({a})
F.softplus({a}, {p})
F.threshold({a}, 0, 0)
F.threshold({a}, 0.3, {s})
{a}.clamp(min=0)
{a}.clamp(0, 0.5)
{a}.clamp(-0.5, {p})
{a}.clamp_min(0)
{a}.clamp_max(0.4)
F.rrelu({a})
F.hardsigmoid({a})
{a}.sigmoid()
{a}.tanh()
F.softsign({a})
F.logsigmoid({a})
F.softshrink({a}, 0.1)
F.hardshrink({a}, 0.1)
F.tanhshrink({a})
{a}.exp()
{a}.expm1()
({a}.abs() + 0.5).log()
{a}.abs().log1p()
({a}.square() + 0.1).sqrt()
({a}.abs() + 0.5).rsqrt()
({a}.abs() + 1).reciprocal()
{a} ** 2
{a} ** 3
({a}.abs() + 0.5) ** {s}
{a}.abs()
{a}.sin()
{a}.cos()
{a}.atan()
{a}.tanh().asin()
{a}.sinh()
{a}.asinh()
{a}.erf()
{a}.lgamma()
{a}.frac()
{a}.nan_to_num()
{a}.sinc()
{a}.logit(0.1)
-{a}
{a}.fmod(0.7)
{a}.remainder(0.7)
{a}.floor() + {a}
{a}.ceil() * {b}
{a}.round() + {b}
{a}.trunc() * {b}
{a}.sign() * {b}
{a}.sgn() + {b}
{a}.detach() * {b}
torch.bernoulli({a}.sigmoid()) * {b}
torch.poisson({a}.abs()) + {b}
{a}.div(0.3, rounding_mode='floor') + {b}
{a}.float().double()
aten._to_copy({a}, dtype=torch.float32).double()
{a}.to(torch.complex128).real
torch.special.xlogy({a}, {b}.abs() + 1)
{a}.i0()
torch.special.erfcx({a}.abs())
{a}.digamma()
""",
    "sums and products": """
{a} + {b}
torch.add({a}, {b}, alpha={s})
{a} - {b}
torch.sub({a}, {b}, alpha={s})
{s} - {a}
torch.rsub({a}, {b}, alpha={s})
{a} * {b}
{a} * {s}
{a} * const({k}, 1)
{a} / ({b}.abs() + 1)
{a} / {p}
{s} / ({a}.abs() + 1)
torch.maximum({a}, {b})
torch.minimum({a}, {b})
{a} + {b}.mean()
torch.atan2({a}, {b})
torch.hypot({a}, {b})
torch.logaddexp({a}, {b})
torch.lerp({a}, {b}, 0.3)
torch.addcmul({a}, {b}, {b})
torch.addcdiv({a}, {b}, {b}.abs() + 1)
torch.copysign({a}, {b})
torch.where({a} > {b}, {a}, {b} * 2)
{a}.masked_fill({a} > 0.3, {s})
{a}.masked_fill({b} > 0, {b}.sum())
({a} > 0).double() * {b}
{a} @ {b}
{a} @ {b}.mT
{a} @ const({k}, {a}.shape[-1], 3)
{a}.mT @ {a}
F.linear({a}, const({k}, 3, {a}.shape[-1]), const({k}, 3))
F.linear({a}, {b})
torch.einsum('...i,...i->...', {a}, {b})
{a}.flatten(1) @ const({k}, {a}.flatten(1).shape[1], 4)
torch.mm({a}.flatten(1), {b}.flatten(1).t())
torch.addmm({b}.mean(), {a}.flatten(1), const({k}, {a}.flatten(1).shape[1], 3), beta=2, alpha={s})
torch.addmm(const({k}, 3), {a}.flatten(1), const({k}, {a}.flatten(1).shape[1], 3))
torch.bmm({a}.flatten(2), {b}.flatten(2).mT)
torch.bmm({a}.flatten(2), const({k}, len({a}), {a}.flatten(2).shape[2], 2))
torch.baddbmm({b}.mean(), {a}.flatten(2), {a}.flatten(2).mT)
torch.outer({a}.flatten()[:5], {b}.flatten()[:4])
torch.cdist({a}.flatten(2), {b}.flatten(2))
torch.dot({a}.flatten(), {a}.flatten())
torch.kron({a}[..., :2], const({k}, 2))
torch.linalg.inv(torch.eye({a}.shape[-1], dtype=torch.float64) * 9 + {a}.mT @ {a})
{a}.diff(dim={i})
torch.linalg.vector_norm({a}, dim={i})
{a}.norm()
F.normalize({a}, dim={i})
F.cosine_similarity({a}, {b}, {i})
""",
    "reductions": """
{a}.sum()
{a}.sum({i})
{a}.sum({i}, keepdim=True)
{a}.mean()
{a}.mean({i})
{a}.mean((-1, -2))
{a}.mean({i}, keepdim=True)
{a}.var({i})
{a}.std({i}, correction=0)
{a}.amax({i})
{a}.amin(({i}, -1))
{a}.max({i})[0]
{a}.max()
{a}.min({i})[0]
{a}.median({i})[0]
{a}.prod({i})
{a}.logsumexp({i})
{a}.cumsum({i})
{a}.cumprod({i})
{a}.cummax({i})[0]
{a}.logcumsumexp({i})
{a}.softmax({i})
{a}.log_softmax({i})
F.softmin({a}, {i})
F.glu({a}, {i})
{a}.sort({i})[0]
{a}.topk(2, {i})[0]
{a}.kthvalue(1, {i})[0]
{a}.aminmax(dim={i})[1]
{a}.nansum({i})
{a}.quantile(0.3, {i})
torch.var_mean({a}, {i}, correction=0)[1]
""",
    "moves": """
{a}.flatten()
{a}.flatten(1)
{a}.flatten(2).transpose(1, 2)
{a}.reshape(-1)
{a}.reshape(len({a}), -1)
{a}.view(-1)
{a}.view({a}.shape[0], -1)
{a}.unsqueeze({i})
{a}.squeeze()
{a}.squeeze({i})
{a}[None]
{a}.unflatten({i}, (2, -1))
{a}.transpose({i}, {i})
{a}.mT
{a}.movedim(0, {i})
{a}.swapaxes(0, -1)
{a}.permute(*torch.arange({a}.dim()).roll({i}).tolist())
{a}.flatten(1).t()
{a}.contiguous()
{a}.clone()
{a}.contiguous(memory_format=torch.channels_last)
{a}.clone(memory_format=torch.contiguous_format)
{a}.ravel()
{a}.expand(2, *{a}.shape)
{a}.mean({i}, keepdim=True).expand_as({a})
{a}.repeat(2, *[1] * {a}.dim())
{a}.tile(2)
{a}.repeat_interleave(2, {i})
{a}.roll({p}, {i})
{a}.flip({i})
{a}.rot90({p}, (-2, -1))
{a}[:, ::2]
{a}[..., 1:]
{a}[..., -3:-1]
{a}[:, {i}]
{a}[{i}]
{a}[..., 0]
{a}[:0]
{a}.narrow({i}, 0, 2)
{a}.select({i}, 0)
{a}[:, [0, -1, 0]]
{a}[{a} > 0.5]
{a}[{a} > 1e9]
{a}[{a} > 1e9].view(-1, 4).sum(0)
{a}.gather({i}, {a}.argsort({i}))
{a}.index_select({i}, torch.tensor([1, 0, 1]))
{a}.take(torch.tensor([0, 3, 3]))
{a}.masked_select({a} > 0)
torch.take_along_dim({a}, {a}.argsort({i}), {i})
torch.cat([{a}, {b}], {i})
torch.cat([{a}, const({k}, *{a}.shape), {a} * 2], {i})
torch.cat([{a}, torch.zeros(0, dtype=torch.float64), {b}], 1)
torch.stack([{a}, {b}], {i})
torch.stack([{a}, {a} * 2, {a}], 0)
torch.cat({a}.split(2, {i})[::-1], {i})
{a}.split([1, {a}.shape[1] - 1], 1)[1]
{a}.chunk(2, {i})[0]
{a}.chunk(2, {i})[-1]
{a}.unbind({i})[0]
{a}.tensor_split(3, {i})[1]
torch.unsafe_split({a}, 2, {i})[0]
torch.unsafe_chunk({a}, 2, {i})[0]
torch.split_with_sizes({a}, [2, {a}.shape[1] - 2], 1)[0]
{a}.unfold({i}, 2, 1)
{a}.diagonal(0, -2, -1)
{a}.tril()
{a}.triu(1)
{a}.diag_embed()
{a}.as_strided((2, 2), (1, 2))
{a}.as_strided((2, 3, 2), (4, 1, 1), 1)
torch.slice_scatter({a}, {a}[:, :1] * 2, 1, 0, 1)
torch.select_scatter({a}, {b}.mean() * {a}.select(1, 0), 1, 0)
{a}.scatter({i}, {a}.argsort({i}), {b})
{a}.scatter_add({i}, {a}.argsort({i}), {a})
{a}.index_add(0, torch.tensor([0, 0]), {a}[:2])
{a}.index_fill(0, torch.tensor([0]), {s})
{a}.index_copy(0, torch.tensor([0]), {b}[:1])
torch.meshgrid({a}.flatten()[:3], {a}.flatten()[:2], indexing='ij')[0]
F.pad({a}, (1, 2))
F.pad({a}, (1, -1, 0, 1), value={s})
F.pad({a}, (1, 1), 'reflect')
F.pad({a}, (1, 1, 1, 1), 'reflect')
F.pad({a}[None], (1, 1, 1, 1, 1, 1), 'reflect')
F.pad({a}, (1, 1), 'replicate')
F.pad({a}, (1, 1, 2, 0), 'replicate')
F.pad({a}[None], (1, 1, 1, 1, 0, 1), 'replicate')
F.pad({a}, (1, 1, 1, 1), 'circular')
aten.alias({a})
aten._unsafe_view({a}.contiguous(), [-1])
aten._reshape_alias({a}.contiguous(), [{a}.numel()], [1])
aten.lift_fresh({a})
torch.broadcast_to({a}, (2, *{a}.shape))
torch.atleast_3d({a})
torch.hstack([{a}, {b}])
""",
    "maps": """
F.conv2d({a}, const({k}, 3, {a}.shape[-3], 3, 3), const({k}, 3), 1, 1)
F.conv2d({a}, const({k}, 4, {a}.shape[1], 2, 2), None, 2)
F.conv2d({a}, const({k}, 4, {a}.shape[1], 1, 1))
F.conv2d({a}, const({k}, 4, {a}.shape[1], 3, 3), None, 1, 2, 2)
F.conv2d({a}, const({k}, 2 * {a}.shape[1], 1, 3, 3), None, 1, 1, 1, {a}.shape[1])
F.conv2d({a}, const({k}, 3, {a}.shape[1], 3, 3), padding='same')
F.conv2d({a}, const({k}, 3, {a}.shape[1], 2, 2) * {b}.mean())
F.conv1d({a}.flatten(2), const({k}, 3, {a}.shape[1], 3), None, 2, 1)
F.conv3d({a}[:, :, None], const({k}, 3, {a}.shape[1], 1, 2, 2))
F.conv_transpose2d({a}, const({k}, {a}.shape[1], 3, 2, 2), None, 2)
F.conv_transpose2d({a}, const({k}, {a}.shape[1], 3, 3, 3), None, 2, 1, 1)
F.conv_transpose1d({a}.flatten(2), const({k}, {a}.shape[1], 3, 2))
aten.convolution({a}, const({k}, 3, {a}.shape[1], 2, 2), None, [1, 1], [0, 1], [1, 1], False, [0, 0], 1)
torch._convolution({a}, const({k}, 3, {a}.shape[1], 2, 2), None, [2, 1], [0, 1], [1, 1], False, [0, 0], 1, *[False] * 4)
F.max_pool2d({a}, 2)
F.max_pool2d({a}, 3, 2, 1)
F.max_pool2d({a}, 2, 1, 0, 2)
F.max_pool2d({a}, 3, 2, ceil_mode=True)
F.max_pool2d({a}, 2, return_indices=True)[0]
F.max_pool1d({a}.flatten(2), 2)
F.max_pool3d({a}, 2)
F.max_pool2d({a}[0], 2)
F.adaptive_max_pool2d({a}, 2)
F.adaptive_max_pool1d({a}.flatten(2), 3)
F.avg_pool2d({a}, 2)
F.avg_pool2d({a}, 3, 2, 1, count_include_pad=False)
F.avg_pool1d({a}.flatten(2), 2)
F.avg_pool3d({a}[:, None], 2)
F.adaptive_avg_pool2d({a}, 2)
F.adaptive_avg_pool2d({a}, 1)
aten._adaptive_avg_pool2d({a}, [3, 2])
aten._adaptive_avg_pool3d({a}[:, None], [2, 2, 1])
F.adaptive_avg_pool1d({a}.flatten(2), 3)
F.adaptive_avg_pool3d({a}[:, None], 2)
F.lp_pool2d({a}.abs() + 1, 2, 2)
F.batch_norm({a}, const({k}, {a}.shape[1]), const({k}, {a}.shape[1]).abs() + 0.5)
F.batch_norm({a}, *const({k}, 2, {a}.shape[1]).square() + 0.1, *const({k}, 2, {a}.shape[1]))
F.batch_norm({a}, None, None, training=True)
F.instance_norm({a})
F.layer_norm({a}, {a}.shape[-1:])
F.layer_norm({a}, {a}.shape[1:], const({k}, *{a}.shape[1:]))
F.group_norm({a}, 2)
F.rms_norm({a}, {a}.shape[-1:])
F.local_response_norm({a}, 3)
F.pixel_shuffle({a}, 2)
F.pixel_unshuffle({a}, 2)
F.channel_shuffle({a}, 2)
F.unfold({a}, 2)
F.fold(F.unfold({a}, 2), {a}.shape[2:], 2)
F.interpolate({a}, scale_factor=2)
F.interpolate({a}, (5, 3), mode='bilinear')
F.interpolate({a}, (5, 3), mode='bilinear', antialias=True)
F.interpolate({a}, (3, 7), mode='bicubic')
F.interpolate({a}, (3, 3), mode='bicubic', antialias=True)
F.interpolate({a}, (7, 3), mode='nearest-exact')
F.interpolate({a}, (3, 3), mode='area')
F.interpolate({a}.flatten(2), 5)
F.interpolate({a}.flatten(2), 5, mode='linear')
F.interpolate({a}[:, None], (2, 5, 5), mode='trilinear')
F.interpolate({a}[:, None], (2, 3, 5))
F.interpolate({a}, (7, 3))
F.grid_sample({a}, const({k}, len({a}), 3, 3, 2).tanh(), align_corners=False)
F.grid_sample({a}, {b}[..., :2].tanh(), align_corners=False)
F.affine_grid({a}.flatten()[:6].view(1, 2, 3), (1, 1, 3, 3), align_corners=False)
F.scaled_dot_product_attention({a}, {a} * 2, {a}.relu())
F.scaled_dot_product_attention({a}, {b}, {b}, is_causal=True)
F.scaled_dot_product_attention({a}, {a}, {a}, dropout_p=0.3)
F.dropout({a}, 0.4, training=True)
F.dropout2d({a}, 0.4, training=True)
F.dropout({a}, training=False)
F.alpha_dropout({a}, 0.3, training=True)
F.feature_alpha_dropout({a}, 0.3, training=True)
F.rrelu({a}, training=True)
torch.native_dropout({a}, 0.4, True)[0]
{a} * torch.rand_like({a})
F.embedding(torch.tensor([0, 2, 0]), {a}.flatten(1))
F.one_hot({a}.argmax(-1), {a}.shape[-1]) * {a}
F.mse_loss({a}, {b})
F.cross_entropy({a}.flatten(1), torch.zeros(len({a}), dtype=torch.int64))
layer({k}, nn.LSTM, {a}.shape[-1], 3)({a}.flatten(0, -3))[0]
layer({k}, nn.GRU, {a}.shape[-1], 3)({a}.flatten(0, -3))[1]
layer({k}, nn.RNN, {a}.shape[-1], 3)({a}.flatten(0, -3))[0]
layer({k}, nn.RNN, {a}.shape[-1], 3, nonlinearity='relu')({a}.flatten(0, -3))[0]
layer({k}, nn.LSTMCell, {a}.shape[-1], 3)({a}.flatten(0, -2))[1]
""",
    "complex": """
torch.fft.fft({a})
torch.fft.rfft2({a})
torch.fft.fft2({a}, norm='ortho')
torch.complex({a}, {a}.relu())
torch.polar({a}.abs(), {a})
torch.view_as_complex({a}.unflatten(-1, (-1, 2)).contiguous())
{a} * (1 + 2j)
{a}.to(torch.complex128)
{z} * {a}
{z} + {a}
{z} * {z}
{z} / (2 - 1j)
{z} / ({z}.abs() + 1)
{z}.conj()
-{z}
{z}.conj() * {z}
torch.fft.ifft({z})
{z}.exp()
{z} ** 2
{z} @ {z}.mH
{z}[..., 1:]
{z}.transpose(0, -1)
{z}.sum({i})
{z}.mean({i})
{z}.reshape(-1)
torch.cat([{z}, {z}], -1)
{z}.clone()
{z}.sgn()
{z}.sqrt()
{z} @ torch.complex(const({k}, {z}.shape[-1], 3), const({k}, {z}.shape[-1], 3))
torch.sub({z}, {a}, alpha=2j)
torch.where({z}.abs() > 1, {z}, {z} * 1j)
F.conv2d({z}, const({k}, 2, {z}.shape[1], 2, 2) * (1 + 1j))
""",
    "from complex": """
{z}.abs()
{z}.angle()
{z}.real
{z}.imag
torch.view_as_real({z})
torch.fft.irfft({z})
torch.fft.irfft2({z}, s=(4, 4))
({z} * {z}.conj()).real
{z}.conj().imag
torch.view_as_real({z}.conj().resolve_conj())
{z}.abs().square()
{z}.conj().imag.neg()
""",
    "writes": """
{o} = {a} * 1; {o}.mul_({s})
{o} = {a}.clone(); {o}.relu_()
{o} = {a} * 1; {o}[..., :2].add_({b}.mean())
{o} = {a} * 1; {o}[:, 0] = {s}
{o} = {a} * 1; {o}.view(-1)[::2].zero_()
{o} = {a} * 1; {o}[..., 0] = {b}.mean()
{o} = {a} * 1; {o}[{o} > 0.5] = 0
{o} = {a} * 1; {o}.masked_fill_({a} > 0, {s})
{o} = {a} * 1; {o}.transpose(0, -1).mul_(2)
{o} = const({k}, *{a}.shape); {o}[:, :1] = {a}[:, :1]
{o} = torch.zeros_like({a}); {o} += {a}
{o} = torch.zeros_like({a}); {o}.copy_({b})
{o} = {a} * 1; {o}.add_({o}).sub_(1).div_(3).neg_()
{o} = {a} * 1; y = {o}[:, 1:]; y.tanh_(); {o} = {o} * y.sum()
{o} = {a} * 1; {o}.clamp_(min=0)
{o} = F.leaky_relu_({a} * 1, 0.2)
{o} = F.silu({a} * 1, inplace=True)
{o} = F.hardtanh_({a} * 1, 0, 1)
{o} = {a} * 1; {o}.fill_({b}.mean())
{o} = {a} * 1; {o}.zero_(); {o} = {o} + {b}.sum()
{o} = {a} * 1; {o}.diagonal(0, -2, -1).mul_({s})
{o} = {a}.view(-1); {o}.mul_({s})
{o} = {a}.flatten(1); {o}[:, :2].mul_({s})
{o} = {a}.mT; {o}.add_({b}.mean())
{o} = {a}.detach(); {o} = {o} * {b}
{o} = {a} * 1; {o}.index_put_((torch.tensor([0]),), {b}.mean())
{o} = {a} * 1; {o}.scatter_(-1, {a}.argsort(-1), {s})
{o} = {a} * 1; {o}.round_(); {o} = {o} * {b}
{o} = {a} * 1; {o}.index_add_(0, torch.tensor([0]), {b}[:1])
{o} = {a} * 1; {o}.pow_(2).exp_()
{o} = {a}.expand(2, *{a}.shape).clone(); {o}[0].mul_({s})
{o} = F.dropout({a} * 1, 0.4, training=True, inplace=True)
{o} = torch.empty_like({a}); {o}.copy_({a}); {o}[..., 0].fill_({s})
{o} = {a} * 1; {o}.unsqueeze(0).squeeze_(0).mul_(3)
{o} = {a} * 1; {o}.t_().mul_(2)
""",
}

FAMILIES = {family: source.strip().splitlines() for family, source in _SOURCE.items()}
